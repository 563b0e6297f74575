#!/usr/bin/env bash
# Generate the Python stubs into the folder given (default: common), with a tools release old enough
# that the result imports under protobuf 4.25 to 7 and grpcio 1.62 and later.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-common}
venv=${PROTO_VENV:-.venv-protos}
if [ ! -x "$venv/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet grpcio-tools==1.62.3 mypy-protobuf==3.6.0 setuptools==69.5.1
fi
mkdir -p "$out"
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  protos/choral/v1/*.proto
rm -f "$out/choral/v1/model_pb2_grpc.py" "$out/choral/v1/model_pb2_grpc.pyi"
