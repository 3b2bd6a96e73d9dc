"""What the service promises, the tests that hold it to that, and how to break each promise."""

from typing import NamedTuple


class Promise(NamedTuple):
    """A promise.

    Attributes:
        group: what it is about.
        promise: in a sentence.
        tests: node ids that fail when it is broken.
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


ENGINE = "When the network hangs or fails"
OVERLOAD = "When there is too much to do"
LLMS = "When an LLM misbehaves"
RELOAD = "Reload and drain"
SECURITY = "Security"
SEEN = "Being seen"

PROMISES = [
    Promise(
        ENGINE,
        "Everyone who is let in hears once, and in time, whatever the engine does.",
        ("tests/test_batching_machine.py::test_whatever_happens_everyone_hears_once_and_in_time",),
        "deadlines are not watched",
        "batching/watch.py",
        "self._look_at(self._see_deadlines(now))",
        "self._look_at(now + _TICK)",
    ),
    Promise(
        ENGINE,
        "A batch mate never gets another's answer.",
        ("tests/test_faults.py::test_under_load_everyone_gets_one_right_answer_in_time",),
        "outputs are given out in reverse",
        "batching/outcomes.py",
        "zip(batch, outputs, strict=True)",
        "zip(batch, reversed(outputs), strict=True)",
    ),
    Promise(
        ENGINE,
        "A run that hangs for 5 s is noticed within 2 s, answered for, and told by health "
        "until it is over.",
        ("tests/test_faults.py::test_a_hung_engine_is_noticed_answered_for_and_recovered_from",),
        "stalls are not noticed",
        "batching/watch.py",
        "if not run.stalled and run.elapsed > run.stalled_after:",
        "if False:",
    ),
    Promise(
        ENGINE,
        "Health never says fine while requests can't be answered.",
        ("tests/test_faults.py::test_a_hung_engine_is_noticed_answered_for_and_recovered_from",),
        "the router's fault is not looked at",
        "router.py",
        "if (fault := model.fault()) is not None:",
        "if (fault := None) is not None:",
    ),
    Promise(
        ENGINE,
        "The event loop is never held up by a run, however small it should be.",
        ("tests/test_faults.py::test_a_hung_engine_is_noticed_answered_for_and_recovered_from",),
        "small runs are computed on the loop",
        "text_model.py",
        "engine.soon(",
        "engine.run(",
    ),
    Promise(
        ENGINE,
        "Where the network stalls, Route answers with the reference.",
        ("tests/test_faults.py::test_a_hung_engine_is_noticed_answered_for_and_recovered_from",),
        "a stall is an error like others",
        "router.py",
        "stalled = isinstance(error, EngineStalled)",
        "stalled = False",
    ),
    Promise(
        ENGINE,
        "A run that never comes back ends the process.",
        ("tests/test_watch.py::test_a_run_that_never_comes_back_ends_the_block",),
        "it is waited for for ever",
        "batching/watch.py",
        "elif run.elapsed > max(GIVE_UP, run.stalled_after):",
        "elif False:",
    ),
    Promise(
        ENGINE,
        "A process that was stopped for a while blames no run for it.",
        ("tests/test_watch.py::test_a_process_that_stood_still_blames_no_run",),
        "the time it stood still counts",
        "batching/watch.py",
        "min(now - max(run.start, self._last), _CREDIT)",
        "now - max(run.start, self._last)",
    ),
    Promise(
        ENGINE,
        "Nobody takes a server out of rotation by a prompt that breaks the network.",
        ("tests/test_watch.py::test_a_network_is_at_fault_only_if_it_fails_on_what_it_must_know",),
        "any failed run is a fault",
        "batching/vitals.py",
        "        self._failures += 1\n        if self._watching",
        "        self._failures += 1\n        self.fault = 'x'\n        if self._watching",
    ),
    Promise(
        ENGINE,
        "A row that is no number fails its own input only.",
        ("tests/test_text_model.py::test_an_answer_that_breaks_the_network_fails_alone",),
        "it is passed on",
        "batching/outcomes.py",
        "if not self._sound(value):",
        "if False:",
    ),
    Promise(
        OVERLOAD,
        "Who can't be let in costs no tokenizing.",
        ("tests/test_text_model.py::test_who_is_not_let_in_costs_no_tokenizing",),
        "admission comes after",
        "text_model.py",
        "        self._batcher.admit(call)\n",
        "",
    ),
    Promise(
        OVERLOAD,
        "A caller with little to ask does not wait for one with much.",
        ("tests/test_overload.py::test_a_caller_with_little_does_not_wait_for_one_with_much",),
        "first come, first served across callers",
        "fair.py",
        "self.queue.append((flow.start, since, place, flow))",
        "self.queue.append((0.0, since, place, flow))",
    ),
    Promise(
        OVERLOAD,
        "A full server makes room at the cost of whoever has most.",
        ("tests/test_overload.py::test_a_full_server_makes_room_at_the_cost_of_whoever_has_most",),
        "nobody makes way",
        "batching/admission.py",
        "evicted = queue.evict(call, items)",
        "evicted = None",
    ),
    Promise(
        OVERLOAD,
        "Callers share by weight.",
        ("tests/test_fair.py::test_callers_share_by_weight_while_they_wait",),
        "weights are ignored",
        "fair.py",
        "        flow.start += length / flow.weight\n",
        "        flow.start += length\n",
    ),
    Promise(
        OVERLOAD,
        "The urgent go first, and nothing waits forever.",
        ("tests/test_fair.py::test_nothing_waits_forever",),
        "nothing ages",
        "fair.py",
        "int((now - turns.oldest) / self._aging)",
        "0",
    ),
    Promise(
        OVERLOAD,
        "The refused are told when to come back, and come back then.",
        (
            "tests/test_overload.py::test_the_refused_are_told_when_to_come_back",
            "tests/test_overload.py::test_clients_come_back_when_told_and_not_before",
        ),
        "no push-back",
        "status.py",
        'metadata.append(("grpc-retry-pushback-ms", _pushback(error, context.time_remaining())))',
        "pass",
    ),
    Promise(
        OVERLOAD,
        "Refused clients do not multiply the load.",
        ("tests/test_overload.py::test_refused_clients_do_not_multiply_the_load",),
        "retries are not throttled",
        "client/channel.py",
        '"retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},',
        "",
    ),
    Promise(
        OVERLOAD,
        "Calls beyond a connection's limit wait; none fails.",
        ("tests/test_limits.py::test_calls_beyond_the_limit_of_a_connection_wait_and_none_fails",),
        "gRPC's overload protection is on",
        "guard/connections.py",
        "int(limits.max_pending is not None)",
        "1",
    ),
    Promise(
        LLMS,
        "Calls that failed before any text are made again, others not.",
        ("tests/test_misbehaving.py::test_a_call_is_made_again_before_any_text",),
        "nothing is made again",
        "upstream/providers.py",
        "            not failure.transient\n",
        "            True\n",
    ),
    Promise(
        LLMS,
        "What keeps failing is left alone, and tried again later.",
        ("tests/test_providers.py::test_what_keeps_failing_is_left_alone_and_tried_again_later",),
        "failures in a row do not count",
        "upstream/breaker.py",
        "self._in_a_row = self._in_a_row + 1 if failed else 0",
        "self._in_a_row = 0",
    ),
    Promise(
        LLMS,
        "Fallbacks follow their order and end at the reference.",
        ("tests/test_fallbacks.py::test_fallbacks_follow_their_order_and_end_at_the_reference",),
        "the reference isn't the last",
        "router.py",
        "((last,) if last in served else ())",
        "()",
    ),
    Promise(
        LLMS,
        "The bill is what was sent, to the cent.",
        ("tests/test_money.py::test_the_bill_is_what_was_sent",),
        "only complete candidates are paid for",
        "best_of_n.py",
        "for c in self._candidates),\n            candidates_cancelled",
        "for c in self._candidates if c.complete),\n            candidates_cancelled",
    ),
    Promise(
        LLMS,
        "Slow first tokens, stalls and answers without end are cut.",
        ("tests/test_misbehaving.py::test_patience_ends",),
        "no limit on the whole answer",
        "upstream/chat.py",
        "        if end < until:",
        "        if False:",
    ),
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
        'error("not reloaded, the former goes on: %s", error)\n            continue',
        'error("not reloaded: %s", error)\n            raise',
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
    Promise(
        RELOAD,
        "SIGTERM lets what is under way end well, and refuses the rest in words.",
        ("tests/test_server.py::test_sigterm_answers_what_is_in_flight_and_refuses_the_rest",),
        "what is under way gets no time to finish",
        "app.py",
        "await server.stop(limits.drain_timeout)",
        "await server.stop(None)",
    ),
    Promise(
        SECURITY,
        "Whoever shows no good key gets no further.",
        ("tests/test_auth.py::test_whoever_shows_no_good_key_gets_no_further",),
        "strangers pass",
        "guard/authentication.py",
        "if caller is None:\n            self._refused",
        "if False:\n            self._refused",
    ),
    Promise(
        SECURITY,
        "Forged, expired and misdirected JWTs are refused.",
        ("tests/test_auth.py::test_a_good_token_lets_in_and_all_others_do_not",),
        "the audience is not checked",
        "guard/tokens.py",
        "audience=security.audience,",
        "",
    ),
    Promise(
        SECURITY,
        "Certificates change without a dropped connection.",
        ("tests/test_tls.py::test_certificates_change_without_a_dropped_connection",),
        "files are never read again",
        "guard/tls.py",
        "if state == self._seen:",
        "if True:",
    ),
    Promise(
        SECURITY,
        "A caller spends what its answers really cost, and no more than it may.",
        ("tests/test_limits.py::test_many_at_once_cannot_spend_what_each_finds_left",),
        "what is expected is not reserved",
        "guard/allowance.py",
        "        self._check(usd)\n        self._charge(usd)",
        "        self._check(usd)",
    ),
    Promise(
        SECURITY,
        "Prompts, answers and secrets are never logged.",
        ("tests/test_secrets.py::test_neither_secrets_nor_prompts_nor_answers_are_ever_logged",),
        "a request is logged at DEBUG",
        "service.py",
        "        prompt = convert.prompt(request, self._limits.max_prompt_bytes)\n        policy",
        "        prompt = convert.prompt(request, self._limits.max_prompt_bytes)\n"
        "        __import__('logging').getLogger('bestroute').debug('%s', request)\n"
        "        policy",
    ),
    Promise(
        SECURITY,
        "Only the pinned bundle is served.",
        ("tests/test_bundle.py::test_only_the_pinned_bundle_is_served",),
        "the pin is not passed on",
        "router.py",
        "Bundle.load, directory, settings.bundle_sha256",
        "Bundle.load, directory",
    ),
    Promise(
        SECURITY,
        "A crowd of fields is refused before it is parsed.",
        ("tests/test_fuzz.py::test_a_crowd_of_fields_is_refused_before_it_is_parsed",),
        "they are not counted",
        "wire.py",
        "if len(data) > MOST_FIELDS * _SMALLEST and",
        "if False and",
    ),
    Promise(
        SEEN,
        "A scrape is answered while the event loop is not.",
        ("tests/test_metrics.py::test_a_scrape_is_answered_while_the_event_loop_is_not",),
        "nothing is said of the loop",
        "observe/exposition.py",
        "blocked = max(0.0, time.monotonic() - self._due)",
        "blocked = 0.0",
    ),
    Promise(
        SEEN,
        "Counters do not fall when another router takes over.",
        ("tests/test_metrics.py::test_counters_do_not_fall_when_another_router_takes_over",),
        "counting begins anew",
        "observe/snapshots.py",
        "            self._former.update(self._latest)\n",
        "",
    ),
    Promise(
        SEEN,
        "Cancellation leaves no span open.",
        ("tests/test_tracing.py::test_cancellation_leaves_no_span_open",),
        "a span whose request was cancelled is not ended",
        "observe/spans.py",
        "        if code in _FAULTS:\n"
        "            self._span.set_status(StatusCode.ERROR)\n"
        "        self._span.end()",
        "        if code is not grpc.StatusCode.CANCELLED:\n            self._span.end()",
    ),
    Promise(
        SEEN,
        "With digests, no file of the decision log holds a prompt.",
        ("tests/test_decision_log.py::test_with_hash_no_file_holds_a_prompt",),
        "texts are kept as well",
        "traffic/rows.py",
        "            text if prompts else None,",
        "            text,",
    ),
]
