# The pipeline in a container: docker compose up --build, or
#   docker build -t mdeq . && docker run --rm -v mdeq-results:/app/results mdeq
# torch from PyPI brings CUDA: with NVIDIA's container toolkit, add --gpus all. A CPU-only image, several GB smaller:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t mdeq .
FROM python:3.11-slim-bookworm

# libgl1 and libglib2.0-0: opencv-python's; libsqlite3-0: DVC's and MLflow's stores; git: commits on record;
# tini: passes signals on to the whole pipeline
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libgl1 libglib2.0-0 libsqlite3-0 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 mdeq \
    && mkdir -p /app/data /app/results /app/work /app/mlartifacts /app/.dvc/cache /store \
    && chown -R mdeq:mdeq /app /store

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app

# The dependencies first: they change seldom and weigh most
ARG PIP_EXTRA_INDEX_URL=
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && if [ -z "$PIP_EXTRA_INDEX_URL" ]; then unset PIP_EXTRA_INDEX_URL; fi \
    && pip install -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY --chown=mdeq:mdeq . .
RUN pip install --no-deps -e . \
    && dvc config --local core.no_scm true \
    && chown -R mdeq:mdeq /app/.dvc

USER 1000
ENV MPLCONFIGDIR=/tmp/matplotlib
# -g: a stop reaches the stage and not DVC alone; the stage goes on at the next start
ENTRYPOINT ["tini", "-g", "--"]
CMD ["sh", "-c", "python -m pipeline check && dvc repro && python -m pipeline show"]
