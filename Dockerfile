# What the pipeline needs to run, with a copy of it in /app; a checkout mounted there keeps its results:
#   docker build -t mdeq .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/app" mdeq     # --gpus all --shm-size 2g: with NVIDIA's toolkit
# Without CUDA, several GB smaller:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t mdeq .
FROM python:3.11-slim-bookworm

# For opencv-python, whose windows are never opened: glib, and libGL without the drivers that its package would bring;
# for DVC and MLflow: sqlite and git; and dumb-init, which hands a stop on to the whole pipeline
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends dumb-init git libglib2.0-0 libsqlite3-0 libx11-6 \
    && apt-get download libgl1 libglvnd0 libglx0 \
    && for package in libgl*.deb; do dpkg -x "$package" /; done \
    && rm -rf libgl*.deb /var/lib/apt/lists/* \
    && mkdir -m 777 /app /store
WORKDIR /app

# What weighs most and changes least comes first; less triton (1 GB), which compiles models, where there is a C compiler
ARG TORCH_INDEX=
ARG PACKAGES=/usr/local/lib/python3.11/site-packages
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision \
    && rm -rf "$PACKAGES/triton" && find "$PACKAGES" -name tests -type d -prune -exec rm -rf {} +

COPY pyproject.toml ./
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt \
    && find "$PACKAGES" -name tests -type d -prune -exec rm -rf {} +

COPY . .
RUN chmod -R a+rwX /app

# Any user will do; whoever it is has a home and a name
USER 1000
ENV HOME=/tmp USER=mdeq DVC_SITE_CACHE_DIR=/tmp/dvc PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# As Ctrl-C: the stage saves its state, DVC frees its locks, and the same command goes on
STOPSIGNAL SIGINT
ENTRYPOINT ["dumb-init", "--"]
CMD ["sh", "-c", "[ -e .git ] || dvc config --local core.no_scm true; python -m pipeline check && dvc repro && python -m pipeline sync && python -m pipeline show"]
