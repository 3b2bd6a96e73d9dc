"""A real issuer of JWTs: keys, and an HTTP server that publishes the public ones."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER, AUDIENCE = "https://issuer.test/", "bestroute"
Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class SigningKey:
    """A key pair under an id."""

    def __init__(self, kid: str | None, algorithm: str = "ES256") -> None:
        self.kid, self.algorithm = kid, algorithm
        self.private: Private
        match algorithm[0]:
            case "E" if algorithm == "EdDSA":
                self.private = ed25519.Ed25519PrivateKey.generate()
            case "E":
                self.private = ec.generate_private_key(ec.SECP256R1())
            case _:
                self.private = rsa.generate_private_key(65537, 2048)

    def public(self, **changed: Any) -> dict[str, Any]:
        """As a JSON Web Key."""
        public: Any = self.private.public_key()
        kind: Any = {"R": RSAAlgorithm, "P": RSAAlgorithm}.get(self.algorithm[0], ECAlgorithm)
        if self.algorithm == "EdDSA":
            kind = OKPAlgorithm
        entry = dict(kind.to_jwk(public, as_dict=True))
        if self.kid is not None:
            entry["kid"] = self.kid
        return entry | changed

    def pem(self) -> bytes:
        """The public key, as who confuses algorithms would sign with it."""
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def token(self, subject: object = "alice", **claims: Any) -> str:
        """A JWT; a claim that is None is left out."""
        now = time.time()
        filled = {
            "sub": subject,
            "iss": ISSUER,
            "aud": AUDIENCE,
            "iat": now,
            "exp": now + 600,
            **claims,
        }
        kept = {name: value for name, value in filled.items() if value is not None}
        headers = {} if self.kid is None else {"kid": self.kid}
        return jwt.encode(kept, self.private, self.algorithm, headers=headers)


class Issuer:
    """Publishes keys at `url`.

    Attributes:
        status: what it answers.
        elsewhere: the keys where it redirects to, if its status says so.
        asked: how often it was asked.
    """

    def __init__(self) -> None:
        self.url = ""
        self.keys: list[dict[str, Any]] = []
        self.elsewhere: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0

    async def publish(self, request: web.Request) -> web.Response:
        self.asked += 1
        if "elsewhere" in request.query:
            return web.json_response({"keys": self.elsewhere})
        return web.json_response(
            {"keys": self.keys}, status=self.status, headers={"Location": f"{self.url}?elsewhere"}
        )


@asynccontextmanager
async def publishing() -> AsyncIterator[Issuer]:
    """An issuer on a free port of loopback."""
    issuer = Issuer()
    app = web.Application()
    app.router.add_get("/jwks", issuer.publish)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    issuer.url = f"http://{host}:{port}/jwks"
    yield issuer
    await runner.cleanup()
