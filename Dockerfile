# Two images from one file: `api` (HTTP and SQL, no torch) and `worker` (what computes on a GPU).
# docker build --target api -t winnow-api:0.1.0 . ; docker build --target worker -t winnow-worker:0.1.0 .
FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# A fixed number: both images share the volume on /data, and an orchestrator sees that it is not root.
RUN useradd --uid 10001 --create-home winnow && install --directory --owner winnow --group winnow /data /data/tmp
WORKDIR /opt/winnow
COPY constraints.txt pyproject.toml README.md ./
COPY client client
COPY app app
COPY workers workers
COPY migrations migrations
ENTRYPOINT ["winnow"]

FROM base AS api
RUN pip install --constraint constraints.txt ./client '.[tracing]'
USER 10001
EXPOSE 8000
CMD ["api"]

FROM base AS worker
RUN pip install --constraint constraints.txt ./client '.[worker,tracing]'
USER 10001
CMD ["worker"]
