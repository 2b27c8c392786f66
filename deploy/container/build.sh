#!/usr/bin/env bash
# Builds one target of the Containerfile with buildah.
#
#   BASE=docker.io/library/debian@sha256:<64 digits> deploy/container/build.sh cpu|gpu|client [buildah's options]
#
#   BASE    Debian 12 by digest; without a registry, base.sh makes one and prints its name and digest
#   TAG     the name of the result (localhost/adytum-<target>)
set -euo pipefail

say() { printf 'build.sh: %s\n' "$*" >&2; }
target=${1:-}
case $target in
cpu | gpu | client) shift ;;
*)
    say "usage: BASE=<image by digest> deploy/container/build.sh cpu|gpu|client [buildah's options]"
    exit 2
    ;;
esac
base=${BASE:-}
if [[ ! $base =~ ^[a-z0-9./:_-]+@sha256:[0-9a-f]{64}$ ]]; then
    say "BASE must name an image by its digest, like docker.io/library/debian@sha256:<64 digits>. Without a registry: base.sh."
    say "For today's digest: skopeo inspect --format '{{.Digest}}' docker://docker.io/library/debian:bookworm-slim"
    exit 2
fi
command -v buildah >/dev/null || { say "buildah is missing: apt-get install buildah"; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
exec buildah build --file "$root/deploy/container/Containerfile" --ignorefile "$root/deploy/container/Containerfile.dockerignore" \
    --target "$target" --build-arg BASE="$base" --tag "${TAG:-localhost/adytum-$target}" \
    --timestamp 0 "$@" "$root"
