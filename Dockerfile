# For CUDA GPUs: the package with vLLM, DeepSpeed and what scores. It has been built nowhere yet.
#   docker build -t tsdkd . && docker run --gpus all --ipc host -v "$PWD:/workspace" tsdkd train --config recipe.yaml
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tsdkd
ENV PATH=/opt/tsdkd/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=/workspace/.cache/huggingface
COPY . /src
# vLLM's wheel names the torch that it is built for, so it comes first; DeepSpeed builds its kernels when they are first used.
RUN pip install --no-cache-dir "vllm>=0.22,<=0.31" && pip install --no-cache-dir "/src[deepspeed,peft,qlora,eval,report,pipelines]"
WORKDIR /workspace
ENTRYPOINT ["tsdkd"]
CMD ["--help"]
