"""One model of a KServe-v2 server: what it takes and gives, and the calls.

An error while it is checked tells whoever starts the server what to do. One in a run is gRPC's own:
what follows from it `bestroute.kserve.engine` decides.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
import numpy as np

from bestroute.config import ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Row, padded
from bestroute.errors import BundleInvalid
from bestroute.kserve.v2 import inference_pb2 as pb

_log = logging.getLogger(__name__)
T = TypeVar("T")

SHA256 = "bestroute_bundle_sha256"
"""The parameter of a model's config.pbtxt that says which bundle it is of."""

_SERVICE = "/inference.GRPCInferenceService/"
_INPUTS = ("input_ids", "attention_mask")
_PATIENCE = 5.0
"""Seconds that a question about the model may take."""
_OPTIONS = (
    # A connection of its own: one that is closed because it is dead must not be shared.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
)


class RemoteModel:
    """A model, and a connection to its server.

    Args:
        settings: where it is.
        name: of the model.
        sha256: digest of the bundle that it has to be of.

    Raises:
        ConfigInvalid: `endpoint_ca` can't be read.
    """

    def __init__(self, settings: EngineSettings, name: str, sha256: str) -> None:
        assert settings.endpoint is not None, "checked by the settings"
        self.endpoint, self.name, self._sha256 = settings.endpoint, name, sha256
        self._credentials = _credentials(settings)
        self._connect()

    def _connect(self) -> None:
        address, aio = urlsplit(self.endpoint).netloc, grpc.aio
        self._channel = (
            aio.secure_channel(address, self._credentials, options=_OPTIONS)
            if self._credentials
            else aio.insecure_channel(address, options=_OPTIONS)
        )
        self._infer = self._method("ModelInfer", pb.ModelInferResponse.FromString)
        self._ready = self._method("ModelReady", pb.ModelReadyResponse.FromString)
        self._metadata = self._method("ModelMetadata", pb.ModelMetadataResponse.FromString)
        self._config = self._method("ModelConfig", pb.ModelConfigResponse.FromString)
        self._index = self._method("RepositoryIndex", pb.RepositoryIndexResponse.FromString)

    def _method(self, name: str, read: Callable[[bytes], T]) -> Any:
        return self._channel.unary_unary(
            _SERVICE + name,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=read,
        )

    async def reconnect(self) -> None:
        """Connect anew; runs under way are cancelled."""
        former = self._channel
        self._connect()
        await former.close()

    async def close(self) -> None:
        """Close the connection; runs under way are cancelled."""
        await self._channel.close()

    async def infer(self, inputs: Sequence[Sequence[int]], within: float) -> list[Row]:
        """Run one batch.

        Args:
            inputs: B sequences of token ids.
            within: seconds that it may take, which the server is told.

        Returns:
            B rows, float32 [K].

        Raises:
            grpc.aio.AioRpcError: it failed.
            ValueError: what came isn't as many rows as inputs.
        """
        feeds = padded(inputs)
        shape = feeds["input_ids"].shape
        request = pb.ModelInferRequest(
            model_name=self.name,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(name=name, datatype="INT64", shape=shape)
                for name in _INPUTS
            ],
            raw_input_contents=[feeds[name].tobytes() for name in _INPUTS],
        )
        return _rows(await self._infer(request, timeout=within), shape[0])

    async def check(self) -> int | None:
        """See that it is there, ready, of the right bundle, and takes and gives what it should.

        Returns:
            Most inputs of one run; None: as many as one likes, or the server doesn't tell.

        Raises:
            ConfigInvalid: the server can't be reached, or isn't one.
            BundleInvalid: it has no such model, or another one.
        """
        with self.told():
            await self._check_ready()
            asked = pb.ModelRequest(name=self.name)
            self._check_tensors(await self._metadata(asked, timeout=_PATIENCE))
            try:
                response = await self._config(asked, timeout=_PATIENCE)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                return None
        config: pb.ModelConfig = response.config
        sha256 = config.parameters[SHA256].string_value if SHA256 in config.parameters else ""
        if sha256 and sha256 != self._sha256:
            raise BundleInvalid(
                f'{self.endpoint}: model "{self.name}" is of the bundle with SHA-256 {sha256}, '
                f"not of this one with {self._sha256}; {_EXPORT}"
            )
        return config.max_batch_size or None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn errors of calls into ones for whoever starts the server.

        Raises:
            ConfigInvalid: instead of what `infer` raises.
        """
        at, code = f"engine.endpoint {self.endpoint}", grpc.StatusCode
        try:
            yield
        except ValueError as error:
            raise ConfigInvalid(f'{at}: model "{self.name}" fails: {error}') from error
        except grpc.aio.AioRpcError as error:
            details = error.details()
            if error.code() is code.UNIMPLEMENTED:
                why = (
                    f"is no KServe-v2 server ({details}); name the gRPC port of one, which Triton "
                    "has at 8001"
                )
            elif error.code() is code.UNAVAILABLE:
                why = (
                    f"can't be reached ({details}); start the server, or name its gRPC port, as "
                    "grpcs:// where it has TLS and grpc:// where not"
                )
            elif error.code() is code.DEADLINE_EXCEEDED:
                why = (
                    "doesn't answer in time; see that it can be reached and isn't overloaded, "
                    "lower batching.max_padded_tokens, or raise engine.endpoint_timeout"
                )
            else:
                why = (
                    f'fails at model "{self.name}" ({error.code().name}: {details}); see the log '
                    "of the server there"
                )
            raise ConfigInvalid(f"{at} {why}") from error

    async def _check_ready(self) -> None:
        try:
            asked = pb.ModelRequest(name=self.name)
            ready: pb.ModelReadyResponse = await self._ready(asked, timeout=_PATIENCE)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        else:
            if ready.ready:
                return
        states: dict[str, str] = {}
        try:
            index = await self._index(pb.RepositoryIndexRequest(), timeout=_PATIENCE)
            states = {each.name: f"{each.state}: {each.reason}" for each in index.models}
        except grpc.aio.AioRpcError:  # only Triton has a list, and may forbid it
            _log.debug("%s doesn't list its models", self.endpoint)
        if self.name in states:
            raise BundleInvalid(
                f'{self.endpoint}: model "{self.name}" isn\'t ready ({states[self.name]}); wait '
                "until it is, or see the log of the server there"
            )
        others = f"; it has {', '.join(sorted(states))}" if states else ""
        raise BundleInvalid(f'{self.endpoint} has no model "{self.name}"{others}. {_EXPORT}')

    def _check_tensors(self, metadata: pb.ModelMetadataResponse) -> None:
        """See that token ids go in and rows come out.

        Raises:
            BundleInvalid: something else does.
        """
        takes = {tensor.name: _described(tensor) for tensor in metadata.inputs}
        gives = [_described(tensor) for tensor in metadata.outputs]
        if takes != dict.fromkeys(_INPUTS, "INT64 of 2 axes") or gives[:1] != ["FP32 of 2 axes"]:
            raise BundleInvalid(
                f'{self.endpoint}: model "{self.name}" takes {takes or "nothing"} and gives '
                f"{gives or 'nothing'}, instead of input_ids and attention_mask, INT64 [B, T], and "
                f"FP32 [B, K]; {_EXPORT}"
            )


_EXPORT = (
    "`bestroute-export bundle BUNDLE --triton DIR` writes this bundle's models into a repository "
    "for it to serve"
)


def _credentials(settings: EngineSettings) -> grpc.ChannelCredentials | None:
    if urlsplit(settings.endpoint).scheme != "grpcs":
        return None
    if settings.endpoint_ca is None:
        return grpc.ssl_channel_credentials()
    try:
        return grpc.ssl_channel_credentials(settings.endpoint_ca.read_bytes())
    except OSError as error:
        raise ConfigInvalid(f"engine.endpoint_ca can't be read: {error}") from error


def _described(tensor: pb.ModelMetadataResponse.TensorMetadata) -> str:
    return f"{tensor.datatype} of {len(tensor.shape)} axes"


def _rows(response: pb.ModelInferResponse, items: int) -> list[Row]:
    """The rows of the first output, float32 [K] each.

    Raises:
        ValueError: there aren't as many as items.
    """
    if not response.outputs:
        raise ValueError("the endpoint's answer has no output")
    output, raw = response.outputs[0], response.raw_output_contents
    values = (
        np.frombuffer(raw[0], dtype=np.float32)
        if raw
        else np.array(output.contents.fp32_contents, dtype=np.float32)
    )
    if len(output.shape) != 2 or output.shape[0] != items:
        raise ValueError(f"the endpoint gave {list(output.shape)} for {items} inputs")
    return list(values.reshape(output.shape))
