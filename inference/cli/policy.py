"""`adytum policy`: a client's appraisal policy, from a publisher's statements and a backend's evidence."""

import datetime
import os
from dataclasses import replace
from pathlib import Path

import click

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, PolicyFileError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import NONCE_SIZE
from adytum.attestation.policy import rules
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference import release
from adytum.attestation.reference.measurements import Measurements
from adytum.attestation.verifier.fetch import fetch_document
from adytum.attestation.verifier.pin import policy_from
from adytum.inference.cli.files import FILE


@click.group()
def policy() -> None:
    """The appraisal policy of a client."""


@policy.command()
@click.option("--upstream", metavar="URL", help="The running backend: pin what it shows today.")
@click.option("--measurements", type=FILE, multiple=True, help="From `adytum measure`; may be given several times.")
@click.option("--release", "release_path", type=FILE, help="A signed release; with --release-key.")
@click.option("--release-key", "keys", metavar="HEX", multiple=True, help="The publisher's key; may be given again.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: standard output.")
def init(
    upstream: str | None,
    measurements: tuple[Path, ...],
    release_path: Path | None,
    keys: tuple[str, ...],
    out: Path | None,
) -> None:
    """Write a commented policy: what a publisher states (--measurements, --release), what a backend shows today
    (--upstream), or both, which must then agree. Compare it before you trust it."""
    if upstream is None and not measurements and release_path is None:
        raise click.UsageError("give --upstream, --measurements or --release: a policy must name what it accepts")
    if (release_path is None) != (not keys):
        raise click.UsageError("--release and --release-key go together")
    try:
        stated = [Measurements.load(path) for path in measurements]
        accepted = frozenset(found for one in stated for found in one.accepted)
        required = None if release_path is None else _required(release_path, out, keys)
        origin = (
            [f"the evidence of {upstream} at {datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"]
            if upstream
            else []
        )
        origin += [str(path) for path in measurements] + ([str(release_path)] if release_path else [])
        found = Policy.default(accepted) if upstream is None else _shown(upstream, accepted, required)
        if accepted:
            found = replace(found, measurement=rules.Measurement(accepted))
        if required is not None:
            found = replace(found, release=rules.SignedRelease(required))
            if not accepted:
                # The release names them; a list here would have to change with each release.
                found = replace(found, measurement=rules.Measurement("any"), configuration=rules.Configuration("any"))
    except PolicyFileError as error:
        raise click.UsageError(str(error)) from error
    except AttestationError as error:
        raise click.ClickException(str(error)) from error
    text = f"# From {', '.join(origin)}.\n{found.to_toml()}"
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise click.UsageError(f"{out} cannot be written: {error.strerror}") from error


def _required(path: Path, out: Path | None, keys: tuple[str, ...]) -> release.RequiredRelease:
    try:
        raw = frozenset(bytes.fromhex(key) for key in keys)
    except ValueError:
        raw = frozenset()
    if not raw or any(len(key) != 32 for key in raw):
        raise click.UsageError("--release-key is 64 hexadecimal digits")
    found = release.load(path, "", raw, 0)
    # As the policy's file will name it: from its own folder.
    named = os.path.relpath(path.resolve(), (out.resolve().parent if out else Path.cwd()))
    return replace(found, file=named, minimum=found.release.sequence)


def _shown(upstream: str, accepted: frozenset[bytes], required: release.RequiredRelease | None) -> Policy:
    nonce, checks, now = os.urandom(NONCE_SIZE), Checks(), datetime.datetime.now(datetime.UTC)
    document = fetch_document(upstream, nonce)
    found, verified = policy_from(document, nonce=nonce, trust=TrustRoots(), now=now, checks=checks)
    for check in checks.not_given:
        click.echo(f"not checked: {check.says}", err=True)
    if verified.provider == "simulated":
        click.echo("The evidence is simulated: this policy protects against the network only.", err=True)
    if accepted:
        rules.Measurement(accepted).check(verified.facts)
    if required is not None:
        rules.SignedRelease(required).check(verified.facts)
    return found
