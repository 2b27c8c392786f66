#!/usr/bin/env bash
# Called by build.sh within mmdebstrap: turns the root $1 into the backend's, and makes its initrd, kernel and package list.
set -euo pipefail
root=${1:?the folder}
# From build.sh.
: "${here:?}" "${project:?}" "${wheels:?}" "${work:?}" "${configuration:?}" "${profile:?}"
in_root() { chroot "$root" "$@"; }

in_root dpkg-query --show --showformat '${Package} ${Version}\n' | sort > "$work/packages.txt"

# Python's environments. pip writes no bytecode, because that contains times. It is compiled below, by content.
mkdir -p "$root/wheels" "$root/src"
cp "$wheels"/*.whl "$work"/*.whl "$root/wheels"
cp -r "$work/source/deploy" "$root/src/deploy"
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_NO_COMPILE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
# These name paths of the building machine.
unset PIP_CERT PYTHON
in_root python3 -m venv /opt/adytum/gateway
sed 's/ --hash=.*//' "$project/deploy/requirements/gateway.txt" > "$root/src/gateway.txt"
in_root /opt/adytum/gateway/bin/python -m pip install --quiet --no-deps -r /src/gateway.txt adytum
if [ "$profile" = cpu ]; then
    in_root /src/deploy/engine_env.sh /opt/adytum/engine
else
    in_root python3 -m venv /opt/adytum/engine
    in_root /opt/adytum/engine/bin/python -m pip install --quiet vllm
fi
for venv in gateway engine; do
    in_root "/opt/adytum/$venv/bin/python" -m pip uninstall --quiet --yes pip
    # pip records where and when it found a wheel.
    find "$root/opt/adytum/$venv" -name direct_url.json -delete
    find "$root/opt/adytum/$venv" -name RECORD -exec sed -i '/direct_url\.json/d' {} +
    find "$root/opt/adytum/$venv" -name __pycache__ -prune -exec rm -r {} +
    # Some files in packages are for other versions of Python and do not compile; they are kept as they are.
    in_root python3 -m compileall -q -j 1 --invalidation-mode unchecked-hash "/opt/adytum/$venv" > "$work/compile.log" || true
done
rm -r "$root/wheels" "$root/src"
find "$root/usr" -name __pycache__ -prune -exec rm -r {} +
in_root python3 -m compileall -q -j 1 --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.11 > "$work/compile.log"

# The service, its configuration, and how the machine behaves.
mkdir -p "$root/etc/adytum" "$root/models"
cp -r --no-preserve=ownership "$here/root/." "$root"
cp "$project/deploy/units/adytum.service" "$root/etc/systemd/system"
cp "$configuration" "$root/etc/adytum/backend.toml"
if [ -d "$work/etc" ]; then cp -r "$work/etc/." "$root/etc/adytum"; fi
find "$root/etc/adytum" "$root/etc/fstab" "$root/etc/sysctl.d" "$root/etc/systemd" -type f -exec chmod 0644 {} +
find "$root/etc/adytum" "$root/etc/sysctl.d" "$root/etc/systemd" -type d -exec chmod 0755 {} +
in_root systemctl --quiet enable adytum.service systemd-networkd.service systemd-resolved.service
in_root systemctl --quiet set-default multi-user.target
# There is no login on any console, and a failed start leaves no shell: the machine stops.
in_root systemctl --quiet mask getty@.service serial-getty@.service console-getty.service autovt@.service \
    emergency.service rescue.service ctrl-alt-del.target debug-shell.service systemd-logind.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer systemd-timesyncd.service
ln -sf /lib/systemd/system/poweroff.target "$root/etc/systemd/system/emergency.target"
ln -sf /lib/systemd/system/poweroff.target "$root/etc/systemd/system/rescue.target"
in_root usermod --lock --shell /usr/sbin/nologin root
ln -sf /run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"
echo adytum > "$root/etc/hostname"
: > "$root/etc/machine-id"
cp "$root/usr/lib/os-release" "$work/os-release"

# Kernel, and an initrd with a shell, veritysetup and the modules that opening the root needs.
version=$(basename "$root"/lib/modules/*)
cp "$root/boot/vmlinuz-$version" "$work/vmlinuz"
initrd=$work/initrd
mkdir -p "$initrd/bin" "$initrd/modules"
cp "$here/init" "$initrd/init"
chmod 0755 "$initrd/init"
cp "$root/bin/busybox" "$initrd/bin/busybox"
for tool in sh cat mkdir mount insmod poweroff sleep switch_root; do ln -s busybox "$initrd/bin/$tool"; done
cp "$root/sbin/veritysetup" "$initrd/bin"
in_root ldd /sbin/veritysetup | grep -o '/lib[^ ]*' | sort -u | while read -r library; do
    mkdir -p "$initrd$(dirname "$library")"
    cp -L "$root$library" "$initrd$library"
done
for module in virtio_pci virtio_blk dm-verity squashfs erofs; do
    modprobe --show-depends --set-version "$version" --dirname "$root" --ignore-install "$module"
done | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }' | while read -r file; do
    cp "$file" "$initrd/modules"
    # Decompressed here, because busybox first loads a module as it is and complains if the kernel refuses.
    case $file in *.xz) xz --decompress "$initrd/modules/${file##*/}" ;; esac
    basename "$file" .xz >> "$initrd/modules/order"
done
find "$initrd" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
(cd "$initrd" && find . -mindepth 1 | sort | cpio --quiet --create --format newc --reproducible --owner +0:+0) |
    gzip -9 --no-name > "$work/initrd.img"

# Not needed at run time, or different in each build.
rm -rf "${root:?}"/boot/* "$root"/vmlinuz* "$root"/initrd.img* "$root"/var/lib/apt "$root"/var/cache/* "$root"/var/log/* \
    "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/info "$root"/usr/share/locale "$root"/etc/ld.so.cache-
rm -f "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/etc/shadow- "$root"/etc/passwd- "$root"/etc/group- "$root"/etc/gshadow-
