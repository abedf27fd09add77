"""Serve exports with vLLM: a plugin for vLLM, and the command that starts its server.

    vllm_plugin   the entry point that vLLM calls in each of its processes
    vllm_model    Croc as a model of vLLM
    server        checks an export and starts `vllm serve`

The first two import only vLLM, transformers and the export's own configuration class, so that they
run in an environment without megatron-core.
"""
