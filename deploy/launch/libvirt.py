"""The same machine as a libvirt domain: version 10.5 or later (SEV-SNP). It assigns GPUs by VFIO without iommufd."""

import xml.etree.ElementTree as ET

from adytum.deploy.launch.config import Config, LaunchError


def domain(config: Config, cmdline: str, cbitpos: int) -> str:
    """The domain's XML. Raises `LaunchError` for a setting that a domain cannot express."""
    if not config.network.outgoing:
        raise LaunchError(
            "network.outgoing = false cannot be expressed in a domain with a user network: launch with QEMU, or edit "
            "the domain for a network of yours that enforces it"
        )
    root = ET.Element("domain", type="kvm")
    _text(root, "name", config.name)
    _text(root, "memory", str(config.memory_gib), unit="GiB")
    backing = ET.SubElement(root, "memoryBacking")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")
    _text(root, "vcpu", str(config.vcpus), placement="static")
    if config.gpus is not None:
        sysinfo = ET.SubElement(root, "sysinfo", type="fwcfg")
        _text(sysinfo, "entry", str(config.gpus.mmio64_mib), name="opt/ovmf/X-PciMmio64Mb")
    _boot(root, config, cmdline)
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    ET.SubElement(features, "vmport", state="off")
    cpu = ET.SubElement(root, "cpu", mode="custom", match="exact", check="none")
    _text(cpu, "model", config.vcpu_type, fallback="forbid")
    ET.SubElement(cpu, "maxphysaddr", mode="passthrough")
    ET.SubElement(cpu, "topology", sockets="1", dies="1", clusters="1", cores=str(config.vcpus), threads="1")
    clock = ET.SubElement(root, "clock", offset="utc")
    ET.SubElement(clock, "timer", name="hpet", present="no")
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _text(root, event, "destroy")
    _devices(root, config)
    security = ET.SubElement(root, "launchSecurity", type="sev-snp", kernelHashes="yes")
    _text(security, "cbitpos", str(cbitpos))
    _text(security, "reducedPhysBits", str(config.snp.reduced_phys_bits))
    _text(security, "policy", f"{config.boot.guest_policy:#x}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _boot(root: ET.Element, config: Config, cmdline: str) -> None:
    boot = ET.SubElement(root, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine="q35")
    _text(boot, "loader", config.boot.firmware, type="rom", stateless="yes")
    _text(boot, "kernel", config.boot.kernel)
    if config.boot.initrd is not None:
        _text(boot, "initrd", config.boot.initrd)
    _text(boot, "cmdline", cmdline)


def _devices(root: ET.Element, config: Config) -> None:
    devices = ET.SubElement(root, "devices")
    _text(devices, "emulator", config.qemu)
    for place, disk in enumerate(config.disk):
        element = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(element, "driver", name="qemu", type="raw", iommu="on")
        ET.SubElement(element, "source", file=disk.image)
        ET.SubElement(element, "target", dev=f"vd{chr(ord('a') + place)}", bus="virtio")
        ET.SubElement(element, "readonly")
        _text(element, "serial", disk.serial)
    net = config.network
    interface = ET.SubElement(devices, "interface", type="user")
    ET.SubElement(interface, "backend", type="passt")
    forward = ET.SubElement(interface, "portForward", proto="tcp", address=net.listen)
    ET.SubElement(forward, "range", start=str(net.port), to=str(net.guest_port))
    ET.SubElement(interface, "model", type="virtio")
    ET.SubElement(interface, "driver", iommu="on")
    ET.SubElement(interface, "rom", enabled="no")
    for device in () if config.gpus is None else config.gpus.devices:
        domain_, bus, rest = device.split(":")
        slot, function = rest.split(".")
        hostdev = ET.SubElement(devices, "hostdev", mode="subsystem", type="pci", managed="no")
        ET.SubElement(hostdev, "driver", name="vfio")
        source = ET.SubElement(hostdev, "source")
        ET.SubElement(
            source, "address", domain=f"0x{domain_}", bus=f"0x{bus}", slot=f"0x{slot}", function=f"0x{function}"
        )
        ET.SubElement(hostdev, "rom", bar="off")
    ET.SubElement(devices, "memballoon", model="none")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
