# make image                     PROVIDER=gpu where the host has an NVIDIA driver
# docker run --read-only --tmpfs /tmp -v state:/state -v ./bundle:/bundle:ro -v ./tls:/tls:ro -p 8443:8080 \
#     -e TPEFT_TLS_CERT=/tls/cert.pem -e TPEFT_TLS_KEY=/tls/key.pem tpeft-deploy
#
# `make image` gives BASE with its digest; every package is checked against its SHA-256 in image/PROVIDER.txt.
ARG BASE=python:3.11-slim
FROM ${BASE} AS build
ARG PROVIDER=cpu
COPY image /image
RUN python -m venv /opt/tpeft \
    && /opt/tpeft/bin/pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r /image/${PROVIDER}.txt
COPY . /source
RUN /opt/tpeft/bin/pip install --no-cache-dir --no-deps --no-build-isolation /source \
    && /opt/tpeft/bin/pip uninstall --yes setuptools

FROM ${BASE}
COPY --from=build /opt/tpeft /opt/tpeft
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin tpeft \
    && mkdir --mode 0700 /state && chown tpeft /state
# Bytecode is not written: the root file system may be read-only.
ENV PATH=/opt/tpeft/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TPEFT_STATE=/state \
    TPEFT_HOST=0.0.0.0 \
    TPEFT_PORT=8080 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER tpeft
VOLUME /state
EXPOSE 8080 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["tpeft-deploy", "health"]
ENTRYPOINT ["tpeft-deploy"]
CMD ["serve", "/bundle"]
