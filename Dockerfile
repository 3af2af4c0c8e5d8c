# Debian packages and pip alone. Its steps are run by tests/test_dockerfile.py; the image itself was not built here.
# docker build -t fastgrpo . && docker run --gpus all --shm-size=16g -v $PWD/runs:/fastgrpo/runs fastgrpo doctor
FROM debian:12-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential git ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /fastgrpo
COPY . .
RUN python3 -m venv /opt/venv
# torch's wheels bring CUDA's libraries; the host's driver comes from the container runtime.
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ./kernels '.[train,rewards,logging,serve,gpu]'
ENV PATH=/opt/venv/bin:$PATH
ENTRYPOINT ["fastgrpo"]
