#!/usr/bin/env bash
# Builds the virtual machine's image: deploy/image/build.sh PROFILE CONFIGURATION OUT [NAME=MODEL.img ...]
#
#   PROFILE        cpu or h100: the lists of packages beside this script
#   CONFIGURATION  the backend's TOML file; it goes into the image and so into the measurement
#   NAME=MODEL.img a model's image (python -m adytum.deploy.weights.image make), which the machine mounts on
#                  /models/NAME. Its manifest, MODEL.img.manifest.json, and MODEL.img.canary.json are beside it, and both
#                  go into the image
#
#   DEBIAN_MIRROR, SECURITY_MIRROR   where Debian's packages come from; to build the same image later, a day of
#                                    snapshot.debian.org
#   NVIDIA_MIRROR, NVIDIA_KEYRING    profile h100: NVIDIA's repository for Debian 12, and its key
#   WHEELS                           a folder for the downloaded wheels (OUT/wheels)
#
# OUT gets root.img, vmlinuz, initrd.img, cmdline, adytum.efi (these three in one), packages.txt and image.json. The same
# sources and packages make the same bytes (docs/how-to/image.md). Needs root, and the Debian packages that are named below.
set -euo pipefail

profile=${1:?usage: build.sh PROFILE CONFIGURATION OUT [NAME=MODEL.img ...]}
configuration=$(realpath "${2:?CONFIGURATION is missing}")
mkdir -p "${3:?OUT is missing}"
out=$(realpath "$3")
shift 3
here=$(dirname "$(realpath "$0")")
project=$(realpath "$here/../..")
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
security=${SECURITY_MIRROR:-http://deb.debian.org/debian-security}
wheels=${WHEELS:-$out/wheels}
python=${PYTHON:-python3}

say() { printf '[image] %s\n' "$*"; }
fail() { say "$*" >&2; exit 2; }

[ -f "$here/$profile.packages" ] || fail "there is no profile \"$profile\": cpu or h100"
[ -f "$configuration" ] || fail "there is no $configuration"
[ "$(id -u)" = 0 ] || fail "run this as root: packages are installed into a folder that belongs to root"
for program in mmdebstrap tar2sqfs veritysetup cpio objcopy modprobe; do
    command -v "$program" >/dev/null ||
        fail "$program is missing: apt-get install mmdebstrap squashfs-tools-ng cryptsetup-bin cpio binutils kmod"
done
stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub
[ -f "$stub" ] || fail "$stub is missing: apt-get install systemd-boot-efi"

# The time of the last commit: no time in the image is later.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$project" log -1 --format=%ct)}
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say "1 of 5: wheels"
mkdir -p "$wheels" "$work/source"
# Only committed files, so that two checkouts make the same wheel.
git -C "$project" archive HEAD pyproject.toml README.md LICENSE adytum attestation inference deploy | tar -x -C "$work/source"
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip download --no-deps --only-binary=:all: --require-hashes --dest "$wheels" -r "$project/deploy/requirements/gateway.txt"
pip wheel --no-deps --wheel-dir "$work" "$work/source"
if [ "$profile" = cpu ]; then
    pip download --no-deps --only-binary=:all: --dest "$wheels" -r "$project/deploy/requirements/engine-cpu.txt"
    pip download --no-deps --only-binary=:all: --dest "$wheels" torch==2.13.0+cpu 2>/dev/null ||
        pip download --no-deps --only-binary=:all: --dest "$wheels" --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
else
    pip download --only-binary=:all: --dest "$wheels" "vllm==0.33.0"
fi

say "2 of 5: root file system from Debian's packages"
packages=$(sed 's/#.*//' "$here/common.packages" "$here/$profile.packages" | xargs | tr ' ' ,)
sources="deb $mirror bookworm main
deb $mirror bookworm-updates main
deb $mirror bookworm-backports main
deb $security bookworm-security main"
if [ "$profile" = h100 ]; then
    sources+=$'\n'"deb [signed-by=${NVIDIA_KEYRING:?the key of NVIDIA\'s repository}] ${NVIDIA_MIRROR:?NVIDIA\'s repository} /"
fi
export here project wheels work configuration profile
models=()
for model in "$@"; do
    name=${model%%=*} image=${model#*=}
    for file in "$image" "$image.manifest.json" "$image.canary.json"; do
        [ -f "$file" ] || fail "there is no $file"
    done
    mkdir -p "$work/etc/$name"
    cp "$image.manifest.json" "$work/etc/$name/adytum-manifest.json"
    cp "$image.canary.json" "$work/etc/$name/adytum-canary.json"
    models+=("$("$python" - "$name" "$image.manifest.json" <<'PYTHON'
import json, sys
verity = json.load(open(sys.argv[2]))["verity"]
print(f"adytum.model={sys.argv[1]}:{verity['root_hash']}:{verity['data_size']}")
PYTHON
)")
done
printf '%s\n' "$sources" | mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --aptopt='APT::Install-Recommends "false"' \
    --customize-hook='"$here/customise.sh" "$1"' \
    bookworm "$work/root.tar" -
tar2sqfs --quiet --force --compressor zstd --defaults mtime="$SOURCE_DATE_EPOCH" "$out/root.img" < "$work/root.tar"

say "3 of 5: dm-verity"
size=$(stat --format=%s "$out/root.img")
truncate --size=$(( (size + 4095) / 4096 * 4096 )) "$out/root.img"
size=$(stat --format=%s "$out/root.img")
# A salt keeps hash trees of different images apart; this one must be the same in each build.
salt=$(sha256sum < "$out/root.img" | cut -c 1-64)
root_hash=$(veritysetup format --hash-offset="$size" --salt="$salt" --uuid=00000000-0000-4000-8000-"${salt:0:12}" \
    "$out/root.img" "$out/root.img" | sed -n 's/^Root hash:[[:space:]]*//p')
[ ${#root_hash} = 64 ] || fail "veritysetup printed no root hash"

say "4 of 5: kernel, initrd, command line"
cp "$work/vmlinuz" "$work/initrd.img" "$work/packages.txt" "$out"
line="console=ttyS0 panic=-1 oops=panic quiet loglevel=4 systemd.show_status=0 systemd.getty_auto=no"
[ "$profile" = h100 ] && line+=" swiotlb=524288"
line+=" adytum.root=$root_hash:$size ${models[*]}"
printf '%s' "${line% }" > "$out/cmdline"

say "5 of 5: the three in one EFI program"
objcopy --add-section .osrel="$work/os-release" --change-section-vma .osrel=0x20000 \
    --add-section .cmdline="$out/cmdline" --change-section-vma .cmdline=0x30000 \
    --add-section .linux="$out/vmlinuz" --change-section-vma .linux=0x2000000 \
    --add-section .initrd="$out/initrd.img" --change-section-vma .initrd=0x4000000 \
    "$stub" "$out/adytum.efi"
"$python" - "$out" "$profile" "$root_hash" <<'PYTHON'
import hashlib, json, os, struct, sys
out, profile, root_hash = sys.argv[1:]
# objcopy writes the time of the build into the PE header (TimeDateStamp, 8 bytes after the signature's start), and a
# checksum of the file (64 bytes into the optional header), which firmware ignores: 0 stands for no checksum.
with open(f"{out}/adytum.efi", "r+b") as file:
    file.seek(0x3C)
    header = struct.unpack("<I", file.read(4))[0]
    file.seek(header)
    assert file.read(4) == b"PE\0\0", "objcopy wrote no PE file"
    file.seek(header + 8)
    file.write(struct.pack("<I", int(os.environ["SOURCE_DATE_EPOCH"])))
    file.seek(header + 24 + 64)
    file.write(bytes(4))
files = {}
for name in ("root.img", "vmlinuz", "initrd.img", "cmdline", "adytum.efi", "packages.txt"):
    with open(f"{out}/{name}", "rb") as file:
        files[name] = {"bytes": os.path.getsize(f"{out}/{name}"), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
with open(f"{out}/image.json", "w") as file:
    json.dump({"profile": profile, "root_hash": root_hash, "files": files}, file, indent=2)
    file.write("\n")
PYTHON
say "done in $SECONDS s: $out/image.json"
