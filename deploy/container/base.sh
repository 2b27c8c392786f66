#!/usr/bin/env bash
# Makes localhost/debian-base from Debian's own packages, for machines that reach no registry. Needs root, mmdebstrap and
# buildah.
set -euo pipefail
for tool in mmdebstrap buildah; do
    command -v "$tool" >/dev/null || { printf 'base.sh: %s is missing: apt-get install %s\n' "$tool" "$tool" >&2; exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The packages' signatures are checked with the keys of debian-archive-keyring.
mmdebstrap --variant=minbase --include=ca-certificates bookworm "$work/root.tar" "${MIRROR:-http://deb.debian.org/debian}"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/root.tar" /
buildah config --cmd bash "$container"
buildah commit --quiet --rm "$container" localhost/debian-base
# The value of BASE for build.sh.
buildah images --format '{{.Name}}@{{.Digest}}' localhost/debian-base
