# docker build --build-arg PROVIDER=cpu -t tpeft-deploy .      or PROVIDER=gpu, where the host has an NVIDIA driver
# docker run --read-only --tmpfs /tmp -v state:/state -v ./bundle:/bundle:ro -p 8080:8080 tpeft-deploy
FROM python:3.11-slim AS build
ARG PROVIDER=cpu
COPY . /source
RUN python -m venv /opt/tpeft \
    && /opt/tpeft/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[server,postgres,${PROVIDER}]"

FROM python:3.11-slim
COPY --from=build /opt/tpeft /opt/tpeft
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin tpeft \
    && mkdir /state && chown tpeft /state
# Bytecode is not written: the root file system may be read-only.
ENV PATH=/opt/tpeft/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TPEFT_STATE=/state \
    TPEFT_HOST=0.0.0.0 \
    TPEFT_PORT=8080 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER tpeft
VOLUME /state
EXPOSE 8080 9000
# urllib, as the image has no curl; the server may have TLS, whose certificate is not for this name.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import os, ssl, urllib.request as u; s = 's' if os.environ.get('TPEFT_TLS_CERT') else ''; u.urlopen('http%s://127.0.0.1:%s/v2/health/ready' % (s, os.environ['TPEFT_PORT']), timeout=2, **({'context': ssl._create_unverified_context()} if s else {}))"]
ENTRYPOINT ["tpeft-deploy"]
CMD ["serve", "/bundle"]
