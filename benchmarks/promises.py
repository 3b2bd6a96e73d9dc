"""What the service promises, the tests that hold it to that, and how to break each promise."""

from typing import NamedTuple


class Promise(NamedTuple):
    """A promise.

    Attributes:
        group: what it is about.
        promise: in a sentence.
        tests: node ids below tests/ that fail when it is broken.
        broken_by: what the change does, in words.
        file: below server/bestroute.
        before: what is there, exactly once.
        after: what breaks the promise.
    """

    group: str
    promise: str
    tests: tuple[str, ...]
    broken_by: str
    file: str
    before: str
    after: str


RELOAD = "Reload"

PROMISES = [
    Promise(
        RELOAD,
        "A call is answered by the bundle that it began with, whatever is reloaded meanwhile.",
        ("tests/test_reload.py::test_an_answer_in_the_making_ends_with_the_bundle_that_began_it",),
        "the former bundle is closed although it is in use",
        "live.py",
        "        if not self.users:\n            self.left.set()",
        "        self.left.set()",
    ),
    Promise(
        RELOAD,
        "A bundle that can't be served leaves the former serving.",
        ("tests/test_reload.py::test_a_bundle_that_cannot_be_served_leaves_the_former_serving",),
        "an invalid bundle isn't caught",
        "reloading.py",
        "except (BundleInvalid, ConfigInvalid) as error:",
        "except ConfigInvalid as error:",
    ),
    Promise(
        RELOAD,
        "A watched bundle is loaded once its files are complete, not before.",
        ("tests/test_reload.py::test_a_watched_bundle_is_loaded_when_its_files_have_changed",),
        "files are not waited for to come to rest",
        "reloading.py",
        "if now == last and now != served:",
        "if now != served:",
    ),
]
