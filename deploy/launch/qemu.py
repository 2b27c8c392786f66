"""QEMU's command line for an SEV-SNP guest: version 9.2 or later (9.1 refuses devices by VFIO in SNP guests)."""

from adytum.deploy.launch.config import Config

_MODERN = "disable-legacy=on,iommu_platform=on"
"""A confidential guest's virtio devices must go through its shared memory."""


def arguments(config: Config, cmdline: str, cbitpos: int) -> list[str]:
    """The program and its arguments: without the user's QEMU configuration, default devices or vsock."""
    return [
        config.qemu,
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-name", f"{config.name},debug-threads=on"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-accel", "kvm"),
        *("-machine", "q35,confidential-guest-support=sev0,memory-backend=ram0,vmport=off,hpet=off"),
        *("-cpu", f"{config.vcpu_type},host-phys-bits=on"),
        *("-smp", f"cpus={config.vcpus},sockets=1,cores={config.vcpus},threads=1"),
        *("-m", f"{config.memory_gib}G"),
        *("-object", f"memory-backend-memfd,id=ram0,size={config.memory_gib}G,share=on,prealloc=off"),
        *("-object", snp_guest(config, cbitpos)),
        *("-bios", config.boot.firmware, "-kernel", config.boot.kernel),
        *(("-initrd", config.boot.initrd) if config.boot.initrd else ()),
        *("-append", cmdline),
        *_disks(config),
        *_network(config),
        *_gpus(config),
        # The guest's output helps to debug an image; in service the host has no use for it.
        *("-serial", "none", "-monitor", "none"),
        *("-qmp", f"unix:{config.run_folder}/{config.name}.qmp,server=on,wait=off"),
    ]


def snp_guest(config: Config, cbitpos: int) -> str:
    """The confidential guest. The report contains the policy, and the measurement the hashes."""
    return (
        f"sev-snp-guest,id=sev0,policy={config.boot.guest_policy:#x},cbitpos={cbitpos},"
        f"reduced-phys-bits={config.snp.reduced_phys_bits},kernel-hashes=on"
    )


def _disks(config: Config) -> list[str]:
    found: list[str] = []
    for place, disk in enumerate(config.disk):
        found += ["-blockdev", f"driver=file,node-name=file{place},filename={disk.image},read-only=on"]
        found += ["-blockdev", f"driver=raw,node-name=disk{place},file=file{place},read-only=on"]
        found += ["-device", f"virtio-blk-pci,drive=disk{place},serial={disk.serial},{_MODERN}"]
    return found


def _network(config: Config) -> list[str]:
    net = config.network
    forward = f"hostfwd=tcp:{net.listen}:{net.port}-:{net.guest_port}"
    restrict = "off" if net.outgoing else "on"
    # No option ROM: it would be unmeasured code of the host in the guest's firmware.
    return [
        *("-netdev", f"user,id=net0,ipv6=off,restrict={restrict},{forward}"),
        *("-device", f"virtio-net-pci,netdev=net0,romfile=,{_MODERN}"),
    ]


def _gpus(config: Config) -> list[str]:
    if config.gpus is None:
        return []
    found = ["-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={config.gpus.mmio64_mib}"]
    backend = ""
    if config.gpus.iommufd:
        found += ["-object", "iommufd,id=iommufd0"]
        backend = ",iommufd=iommufd0"
    for place, device in enumerate(config.gpus.devices):
        found += ["-device", f"pcie-root-port,id=port{place},bus=pcie.0,chassis={place + 1}"]
        found += ["-device", f"vfio-pci,host={device},bus=port{place},rombar=0{backend}"]
    return found
