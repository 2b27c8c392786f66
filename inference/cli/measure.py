"""`adytum measure`: the launch measurements of a confidential VM, computed from the files that it is started with."""

from pathlib import Path

import click

from adytum.inference.cli.files import FILE


def number(text: str) -> int:
    """An integer, decimal or with 0x."""
    try:
        return int(str(text), 0)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number") from None


@click.command()
@click.option("--firmware", type=FILE, required=True, help="OVMF built for AMD SEV (OvmfPkg/AmdSev).")
@click.option("--kernel", type=FILE, required=True, help="What QEMU's -kernel gets.")
@click.option("--initrd", type=FILE, help="What QEMU's -initrd gets.")
@click.option("--append", "cmdline", help="The exact text after QEMU's -append.")
@click.option("--cmdline-file", type=FILE, help="A file with that text; a line feed at its end is dropped.")
@click.option("--vcpus", type=int, multiple=True, required=True, help="May be given several times.")
@click.option("--vcpu-type", default="EPYC-v4", show_default=True, help="What QEMU's -cpu gets.")
@click.option("--guest-features", type=number, default=0x1, help="SEV_FEATURES; default 0x1.")
@click.option("--guest-policy", type=number, default=0x30000, help="The SNP policy of the launch; default 0x30000.")
@click.option(
    "--firmware-digest", metavar="HEX", help="Launch digest of the whole firmware, if FIRMWARE is only its end."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: standard output.")
def measure(
    firmware: Path,
    kernel: Path,
    initrd: Path | None,
    cmdline: str | None,
    cmdline_file: Path | None,
    vcpus: tuple[int, ...],
    vcpu_type: str,
    guest_features: int,
    guest_policy: int,
    firmware_digest: str | None,
    out: Path | None,
) -> None:
    """Compute the launch measurement for each number of virtual CPUs (docs/how-to/measurement.md)."""
    # Imported here: no other command needs the deployment's packages.
    from adytum.attestation.reference.launch import Launch, MeasureError
    from adytum.attestation.reference.launch import measure as compute

    if (cmdline is None) == (cmdline_file is None):
        raise click.UsageError(
            'give the command line, either as --append or as --cmdline-file; --append "" is an empty one'
        )
    if cmdline_file is not None:
        try:
            cmdline = cmdline_file.read_text("ascii").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{cmdline_file} cannot be read as ASCII text: {error}") from error
    launch = Launch(firmware, kernel, initrd, cmdline or "", vcpu_type, guest_features, guest_policy)
    try:
        digest = None if firmware_digest is None else bytes.fromhex(firmware_digest)
        if digest is not None and len(digest) != 48:
            raise ValueError
    except ValueError:
        raise click.UsageError("--firmware-digest is 96 hexadecimal digits") from None
    try:
        data = compute(launch, vcpus, firmware_digest=digest).encode()
        if out is None:
            click.echo(data.decode(), nl=False)
        else:
            out.write_bytes(data)
    except MeasureError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"{out} cannot be written: {error.strerror}") from error
