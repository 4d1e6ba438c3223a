# facelab's app in a container, without root. Lesson 34 explains each line.
#   docker build -t facelab .
#   docker run --rm -it -v facelab:/data facelab facelab-app --set-password /data/password
#   docker run --rm -p 127.0.0.1:7860:7860 -v facelab:/data --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges facelab

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/facelab
ENV PATH=/opt/facelab/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY spaces/requirements.txt spaces/requirements.txt
RUN pip install -r spaces/requirements.txt
COPY pyproject.toml settings.ini setup.py MANIFEST.in README.md LICENSE ./
COPY data data
COPY facelab facelab
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 facelab \
 && install -d -o facelab -g facelab -m 700 /data
COPY --from=build /opt/facelab /opt/facelab
ENV PATH=/opt/facelab/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 FACELAB_DATA=/data FACELAB_CACHE=/data/cache HOME=/tmp NO_ALBUMENTATIONS_UPDATE=1
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/', timeout=8)"]
CMD ["facelab-app", "--host", "0.0.0.0", "--auth", "facelab:/data/password", "--gallery", "/data/people.npz"]
