"""Make the bucket for artifacts when it is not there yet; waits a minute for a store that is just starting."""

import os
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

bucket = os.environ["ARTIFACT_BUCKET"]
store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
deadline = time.monotonic() + 60
while True:
    try:
        if bucket not in [each["Name"] for each in store.list_buckets()["Buckets"]]:
            store.create_bucket(Bucket=bucket)
        break
    except (BotoCoreError, ClientError):
        if time.monotonic() > deadline:
            raise
        time.sleep(1)
