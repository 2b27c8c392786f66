"""The parts of a backend, made from its configuration: `Parts.of` makes each once, in the order in which it is needed.

It starts nothing, asks no device for evidence and opens no port. Raises `StepFailed` if a part cannot be made.
"""

import datetime
import importlib.metadata
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from starlette.types import ASGIApp

from adytum.attestation.collect.devices import Devices
from adytum.attestation.collect.rounds import Collector
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.document.evidence import Claims, ModelClaim
from adytum.inference.backend import models
from adytum.inference.channel import keyconfig
from adytum.inference.core.config import Config
from adytum.inference.core.lifecycle import Lifecycle, Step, StepFailed
from adytum.inference.engine.supervise.fleet import Fleet
from adytum.inference.engine.supervise.supervisor import NUMBERS, State
from adytum.inference.engine.weights.weights import Manifest
from adytum.inference.gateway.accounting.ledger import ledger
from adytum.inference.gateway.accounting.metering import Records
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.admission.admission import Admission
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.callers.callers import Caller, Callers, CallersError, SignedFile
from adytum.inference.gateway.edge import tls
from adytum.inference.gateway.edge.app import GATEWAY_PATH, create_gateway
from adytum.inference.gateway.edge.connections import Guard
from adytum.inference.gateway.edge.evidence import EvidenceService
from adytum.inference.gateway.exchange.engines import Engines
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import KeyRing


@dataclass(frozen=True, repr=False)
class Parts:
    """What the start, the server and the tasks beside it work on."""

    config: Config
    lifecycle: Lifecycle
    folders: Mapping[str, Path]
    """By model id, like the manifests."""
    manifests: Mapping[str, Manifest]
    pool: Engines
    keys: KeyRing
    callers_file: SignedFile | None
    callers: Callers
    records: Records | None
    tls: ssl.SSLContext | None
    devices: Devices
    fleet: Fleet
    evidence: EvidenceService
    telemetry: Telemetry
    guard: Guard
    gateway: ASGIApp

    @classmethod
    def of(cls, config: Config) -> Self:
        """Raises `StepFailed`."""
        server = config.server
        lifecycle = Lifecycle()
        # The models: their files, the connections to their engines, the engines themselves.
        folders = {model.id: models.folder(config, model) for model in config.models}
        manifests = {model.id: models.manifest(model, folders[model.id]) for model in config.models}
        pool = Engines({model.id: models.socket_path(config, model) for model in config.models})
        # Secrets and names: the channel's keys, the callers', the receipts' and the outer connection's.
        keys = KeyRing(time.time, config.channel.key_lifetime_s, config.channel.key_overlap_s)
        file = callers_file(config)
        known = callers(config, file)
        notary = Notary({name: manifest.root for name, manifest in manifests.items()}, time.time)
        records = _records(config)
        context, spki = _tls(config)
        # The hardware, and what it signs.
        devices = devices_of(config)
        fleet = models.fleet(config, folders, manifests, devices, pool)
        evidence = EvidenceService(
            Collector(devices.cpu, devices.gpus, devices.endorsements),
            lambda: _claims(config, manifests, keys, notary, spki, devices),
            interval=config.evidence.interval_s,
            round_nonces=config.evidence.round_nonces,
            clients=config.evidence.max_clients,
        )
        # The gateway, from the engines outwards.
        telemetry = Telemetry(config.metering.token_bucket, lambda: _gauges(parts, sealed))
        admission = Admission(config, known)
        sealed = SealedService(
            keys,
            admission,
            pool,
            notary,
            ledger(records, telemetry),
            max_requests=server.max_requests,
            request_seconds=server.request_seconds,
            max_upload=server.max_upload_mib << 20,
            load=Load(config.models),
            telemetry=telemetry,
        )
        gateway = create_gateway(
            replica=server.replica,
            padding=config.channel.shape,
            lifecycle=lifecycle,
            model_states=lambda: fleet.states,
            keys=keys,
            evidence=evidence,
            admission=admission,
            sealed=sealed,
        )
        parts = cls(
            config=config,
            lifecycle=lifecycle,
            folders=folders,
            manifests=manifests,
            pool=pool,
            keys=keys,
            callers_file=file,
            callers=known,
            records=records,
            tls=context,
            devices=devices,
            fleet=fleet,
            evidence=evidence,
            telemetry=telemetry,
            guard=Guard(server.max_connections, server.request_seconds),
            gateway=gateway,
        )
        return parts


def callers_file(config: Config) -> SignedFile | None:
    """The signed list of callers, if the configuration names one."""
    if config.callers.file is None or config.callers.signed_by is None:
        return None
    return SignedFile(config.callers.file, bytes.fromhex(config.callers.signed_by))


def callers(config: Config, file: SignedFile | None) -> Callers:
    """The callers that may ask."""
    found: tuple[Caller, ...] | None = None
    serial = 0
    if config.callers.authentication == "keys":
        found = tuple(Caller(name=digest[:12], key_sha256=digest) for digest in sorted(config.callers.key_sha256))
    if file is not None:
        try:
            listed = file.load()
        except CallersError as error:
            raise StepFailed(f"callers.file: {config.callers.file}: {error}") from error
        found, serial = listed.caller, listed.serial
    return Callers(found, clock=time.time, monotonic=time.monotonic, serial=serial)


def devices_of(config: Config) -> Devices:
    """The devices that sign the evidence."""
    try:
        return Devices.of(config.evidence.cpu, config.evidence.gpus)
    except CollectionError as error:
        raise StepFailed(f"evidence.cpu or evidence.gpus: {error}") from error


def _records(config: Config) -> Records | None:
    path = config.metering.records
    return Records(path, config.metering.token_bucket) if path is not None else None


def _tls(config: Config) -> tuple[ssl.SSLContext | None, bytes | None]:
    """The outer connection's context and the SHA-256 of its public key; `None` twice without TLS."""
    if config.tls.mode == "off":
        return None, None
    if config.tls.mode == "generated":
        return tls.generated(config.tls.names, datetime.datetime.now(datetime.UTC))
    assert config.tls.certificate is not None
    assert config.tls.key is not None
    try:
        return tls.from_files(config.tls.certificate, config.tls.key)
    except (OSError, ValueError) as error:
        raise StepFailed(f"tls.certificate or tls.key cannot be used: {error}") from error


def _claims(
    config: Config,
    manifests: Mapping[str, Manifest],
    keys: KeyRing,
    notary: Notary,
    spki: bytes | None,
    devices: Devices,
) -> Claims:
    """What the backend claims at this moment."""
    return Claims(
        key_configurations=keyconfig.encode_list(keys.configurations),
        ehbp_key_configuration=keys.ehbp_configuration.encode(),
        receipt_key=notary.public_key,
        gateway_path=f"{GATEWAY_PATH}/{config.server.replica}",
        replica=config.server.replica,
        tls_spki_sha256=spki,
        models=tuple(
            ModelClaim(id=model.id, task=model.task, aliases=model.aliases, weights_root=manifests[model.id].root)
            for model in config.models
        ),
        configuration_sha256=config.sha256,
        padding=config.channel.padding.value,
        sandbox=config.engines.sandbox,
        software_version=importlib.metadata.version("adytum"),
        cc_mode=devices.cc_mode(),
        issued_at=int(time.time()),
        keys_expire_at=int(keys.expires_at),
    )


def _gauges(parts: Parts, sealed: SealedService) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The numbers that telemetry looks up (`telemetry.GAUGES`)."""
    fleet, pool, keys, evidence, guard = parts.fleet, parts.pool, parts.keys, parts.evidence, parts.guard
    return {
        "adytum_requests_in_progress": [({}, sealed.in_progress)],
        "adytum_engine_requests": [({"model": name}, pool.in_progress(name)) for name in fleet.states],
        "adytum_model_state": [
            ({"model": name, "state": state}, float(state == found))
            for name, found in fleet.states.items()
            for state in State
        ],
        "adytum_engine_restarts": [({"model": name}, float(n)) for name, n in fleet.restarts.items()],
        **{
            metric: [({"model": name}, said[metric]) for name, said in fleet.numbers.items() if metric in said]
            for metric in NUMBERS.values()
        },
        "adytum_step": [({"step": step}, float(step is parts.lifecycle.step)) for step in Step],
        "adytum_connections": [({}, len(guard.open))],
        "adytum_connections_cut": [({}, guard.cut)],
        "adytum_key_age_seconds": [({}, keys.age)],
        "adytum_key_expires_seconds": [({}, keys.expires_at - time.time())],
        "adytum_evidence_rounds": [({}, evidence.rounds)],
        "adytum_evidence_failures": [({}, evidence.failures)],
    }
