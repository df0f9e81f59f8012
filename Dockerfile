# The API of one explainer. Model and keys are not in the image: mount their folders at /srv/model and /srv/keys.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY llava llava
RUN python -m venv /opt/m2f2 && /opt/m2f2/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --home-dir /srv --shell /usr/sbin/nologin m2f2
COPY --from=build /opt/m2f2 /opt/m2f2
# Nothing is downloaded at run time, and nothing is written but temporary files.
ENV PATH=/opt/m2f2/bin:$PATH HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MALLOC_ARENA_MAX=2
WORKDIR /srv
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=180s --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["m2f2"]
CMD ["serve", "--model_path", "/srv/model", "--host", "0.0.0.0", "--keys", "/srv/keys/keys.json", "--log_json", "true"]
