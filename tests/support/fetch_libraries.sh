#!/usr/bin/env bash
# The Python files of GPU libraries, for `pytest -m libraries`: nothing is built or installed.
#
#   PYTHON=python tests/support/fetch_libraries.sh      into build/libraries/<name>-<version>
set -euo pipefail

cd "$(dirname "$0")/../.."
target=build/libraries
python=${PYTHON:-python}

fetch() { # fetch NAME VERSION pip-arguments: one distribution, unpacked
    local name=$1 version=$2 downloads
    shift 2
    [ -d "$target/$name-$version" ] && return
    downloads=$(mktemp -d)
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$python" -m pip download --quiet --no-deps \
        --dest "$downloads" "$@" "$name==$version"
    mkdir -p "$target/partial"
    "$python" - "$downloads" "$target/partial" <<'END'
import sys, tarfile, zipfile
from pathlib import Path

downloads, target = Path(sys.argv[1]), Path(sys.argv[2])
(archive,) = downloads.iterdir()
if archive.suffix == ".whl":
    zipfile.ZipFile(archive).extractall(target)
else:
    for member in (files := tarfile.open(archive)):
        member.name = member.name.partition("/")[2]  # without the folder NAME-VERSION
        if member.name.endswith("flash_attn_interface.py"):
            files.extract(member, target, filter="data")
END
    mv "$target/partial" "$target/$name-$version"
    rm -r "$downloads"
}

for version in 2.8.0 2.20.2; do
    fetch transformer_engine "$version" --only-binary :all:
done
for version in 2.7.0.post2 2.8.3.post2; do # sdists; torch is there, so their setup.py runs without more
    fetch flash_attn "$version" --no-binary :all: --no-build-isolation
done
