"""nginx with TLS, and LiteLLM's proxy, in front of the same engine: one process each, configured for streams."""

import datetime
import json
import os
import secrets
import shutil
import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from adytum.benchmarks.channel.arms import Arm, Opener, plain, post
from adytum.benchmarks.load.load import PATH
from adytum.benchmarks.processes import free_port, program, wait_for

_NGINX = """daemon off; master_process off; worker_rlimit_nofile 65536;
pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 20000; }}
http {{
  access_log off; proxy_buffering off; proxy_request_buffering off; keepalive_requests 1000000;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engine {{ server unix:{socket}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} ssl backlog=4096;
    ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_buffer_size 4k;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_read_timeout 600;
    }}
  }}
}}
"""


def versions(folder: Path) -> dict[str, str]:
    """The versions of the installed peers."""
    found = {}
    if binary := _nginx_binary():
        found["nginx"] = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr.strip()
    if (folder / "bin" / "litellm").exists():
        code = "import importlib.metadata as m; print(m.version('litellm'))"
        asked = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True)
        found["litellm"] = asked.stdout.strip()
    return found


def nginx(stack: ExitStack, folder: Path, socket: Path) -> Arm | str:
    """The arm, or why there is none."""
    binary = _nginx_binary()
    if binary is None:
        return "nginx is not installed: apt-get install nginx-light"
    _certificate(folder)
    port = free_port()
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, socket=socket, port=port))
    pid = stack.enter_context(program([binary, "-c", str(folder / "nginx.conf")], folder / "nginx.log"))
    if not wait_for(port, 10):
        return f"nginx did not start: {(folder / 'nginx.log').read_text()[-200:]}"
    # A fresh key for each run, trusted by its own certificate.
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    context.check_hostname = False
    return Arm("nginx TLS", port, pid, plain, context)


def litellm(stack: ExitStack, folder: Path, environment: Path, engine_port: int) -> Arm | str:
    """The arm, or why there is none."""
    binary = environment / "bin" / "litellm"
    if not binary.exists():
        return f"LiteLLM is not in {environment}: benchmarks/channel/peers.sh {environment}"
    port = free_port()
    base = f"http://127.0.0.1:{engine_port}/v1"
    parameters = {"model": "openai/latest", "api_base": base, "api_key": "none"}
    # It does not start without a key.
    key = "sk-" + secrets.token_hex(32)
    configuration = {
        "general_settings": {"master_key": key},
        "model_list": [{"model_name": "latest", "litellm_params": parameters}],
        "litellm_settings": {"telemetry": False, "drop_params": False},
    }
    # JSON is YAML.
    (folder / "litellm.yaml").write_text(json.dumps(configuration))
    command = [str(binary), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    settings = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    pid = stack.enter_context(program([*command, "--num_workers", "1"], folder / "litellm.log", settings))
    if not wait_for(port, 90):
        return f"LiteLLM did not start: {(folder / 'litellm.log').read_text()[-300:]}"

    def request(content: bytes) -> tuple[bytes, Opener]:
        sent = post(PATH, content, "application/json", f"Authorization: Bearer {key}\r\n")
        return sent, lambda _, answer: answer

    return Arm("LiteLLM", port, pid, request)


def _nginx_binary() -> str | None:
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def _certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
    certificate = built.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
