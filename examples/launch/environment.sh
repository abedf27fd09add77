# shellcheck shell=bash
# Variables of CUDA, NCCL and torch for a training job; sourced by every launcher.
# Each can be set beforehand: what is there is kept.

# One hardware queue per GPU: kernels start in the order they were launched, which megatron-core's
# overlap of tensor-parallel communication with GEMMs relies on (Hopper and older).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Rows differ in length from step to step; expandable segments keep that from fragmenting memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# Tensors handed to NCCL are freed by reference counts, not held until an event is seen: less memory.
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}

# float32 products stay float32's. NVIDIA's images set it to 1 (so what is there is not kept): TF32
# changes token assignments.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0

# NVLink SHARP buffers cost up to some GB per GPU; off unless the network team says otherwise.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

# Warnings only. INFO shows which interfaces and rings are used: turn it on when a cluster is new.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The flight recorder keeps the last collectives of every rank and writes them when one times out.
# The size has two names, the first of newer versions of torch.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# After a restart the workers make a store of their own; sharing torchrun's fails half of the time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# Loader threads and DALI parallelise over samples; one OpenMP thread per process is enough.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Fast tokenizers would otherwise start threads and then warn about the fork.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Not set here, because they name your network; see `croc doctor --network`:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of the bootstrap, when hosts have several
#   NCCL_IB_HCA                              InfiniBand adapters to use, when some are for storage
