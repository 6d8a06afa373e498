# An MLflow server with the drivers for PostgreSQL and S3, at mm's version. From the repository's root:
#   docker build -f cluster/images/mlflow.Dockerfile -t registry.example.com/mm-mlflow:0.1.0 .
FROM python:3.11-slim-bookworm
COPY constraints.txt /opt/
RUN pip install --no-cache-dir --constraint /opt/constraints.txt mlflow boto3 psycopg2-binary==2.9.13 \
    && useradd --uid 1000 --create-home mlflow
ENV MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/mlflow
CMD ["mlflow", "server", "--help"]
