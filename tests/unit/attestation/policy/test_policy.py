"""The policy: each rule on both sides of its border, and a file that has to state everything."""

import datetime
from pathlib import Path

import pytest

from adytum.attestation.core.errors import PolicyError, PolicyFileError, VerificationError
from adytum.attestation.policy import hardware, rules
from adytum.attestation.policy.file import KEYS
from adytum.attestation.policy.policy import Policy
from adytum.attestation.simulated.device import SimulatedCpu
from tests.unit.attestation.support import CLAIMS, NOW, START, check, clock, document, with_claims

STATED = """
cpu = ["simulated"]
measurement = ["{measurement}"]
release = "none"
minimum_tcb = "any"
debug = "refused"
migration = "refused"
vmpl = [0]
platform_set = "any"
platform_clear = "any"
chips = "any"
pcrs = "any"
tdx_status = ["UpToDate"]
cpu_revocation = "required"
gpu = "none"
gpu_architecture = "any"
cc_mode = ["none"]
gpu_driver = "any"
gpu_vbios = "any"
gpu_rims = "required"
gpu_revocation = "required"
configuration = ["{configuration}"]
software = ["0.1.0", "0.2.0"]
replica = ["alpha"]
tls = ["{tls}"]
padding = ["pad"]
sandbox = ["full"]
maximum_age_s = 300
clock_skew_s = 60

[models]
"demo/llama" = "{llama}"
"demo/e5" = "{e5}"
"demo/unused" = "{llama}"
""".format(
    measurement="00" * 48,
    configuration="33" * 32,
    tls=bytes(range(32)).hex().upper(),
    llama="11" * 32,
    e5="22" * 32,
)


def policy(**lines: str) -> Policy:
    """`STATED` with some lines replaced by name."""
    text = STATED
    for key, value in lines.items():
        start = text.index(f"\n{key} = ") + 1
        text = f"{text[:start]}{key} = {value}{text[text.index(chr(10), start) :]}"
    return Policy.from_toml(text.encode())


def with_models(models: str) -> Policy:
    return Policy.from_toml((STATED[: STATED.index("[models]")] + models).encode())


def test_a_policy_that_states_everything_accepts() -> None:
    assert check(document(), policy=policy()).claims == CLAIMS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpu", '["sev-snp"]'),
        ("cpu", '["sev-snp", "tdx"]'),
        ("measurement", f'["{"01" * 48}"]'),
        ("gpu", '"required"'),
        ("cc_mode", '["on"]'),
        ("cc_mode", '["on", "off", "devtools"]'),
        ("configuration", f'["{"34" * 32}"]'),
        ("software", '["0.1.1"]'),
        ("software", '["0.1.0.1", "0.1"]'),
        ("replica", '["alph", "alphaa"]'),
        ("tls", '"none"'),
        ("tls", f'["{"00" * 32}"]'),
        ("padding", '["off"]'),
        ("sandbox", '["none"]'),
    ],
)
def test_each_rule_refuses_by_its_name(key: str, value: str) -> None:
    with pytest.raises(PolicyError) as refused:
        check(document(), policy=policy(**{key: value}))
    assert refused.value.claim == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpu", '["sev-snp", "simulated"]'),
        ("measurement", '"any"'),
        ("configuration", '"any"'),
        ("software", '"any"'),
        ("replica", '"any"'),
        ("tls", '"any"'),
        ("padding", '["off", "pad"]'),
        ("sandbox", '["none", "full"]'),
        ("cc_mode", '["none", "on"]'),
    ],
)
def test_each_rule_accepts_what_it_lists(key: str, value: str) -> None:
    assert check(document(), policy=policy(**{key: value})).claims == CLAIMS


def test_tls() -> None:
    bare = document(with_claims(tls_spki_sha256=None))
    assert check(bare, policy=policy(tls='"none"')).claims.tls_spki_sha256 is None
    assert check(bare, policy=policy(tls='"any"')).claims.tls_spki_sha256 is None
    with pytest.raises(PolicyError, match="no TLS key") as refused:
        check(bare, policy=policy())
    assert refused.value.claim == "tls"


@pytest.mark.parametrize(
    "models",
    [
        f'[models]\n"demo/llama" = "{"11" * 32}"',
        f'[models]\n"demo/llama" = "{"11" * 32}"\n"demo/e5" = "{"23" * 32}"',
        f'[models]\nlatest = "{"11" * 32}"\n"demo/e5" = "{"22" * 32}"',
        f'[models]\n"demo/LLAMA" = "{"11" * 32}"\n"demo/e5" = "{"22" * 32}"',
        f'[models]\n"demo/llama" = "{"22" * 32}"\n"demo/e5" = "{"11" * 32}"',
    ],
)
def test_every_claimed_model_has_to_be_listed_with_its_weights(models: str) -> None:
    with pytest.raises(PolicyError) as refused:
        check(document(), policy=with_models(models))
    assert refused.value.claim == "models"
    assert check(document(), policy=with_models('models = "any"')).claims == CLAIMS


@pytest.mark.parametrize(
    ("seconds", "claim"), [(360, None), (361, "maximum_age_s"), (-60, None), (-61, "clock_skew_s")]
)
def test_age(seconds: int, claim: str | None) -> None:
    now = NOW + datetime.timedelta(seconds=seconds)
    if claim is None:
        assert check(document(), policy=policy(), now=now).verified_at == now
    else:
        with pytest.raises(PolicyError) as refused:
            check(document(), policy=policy(), now=now)
        assert refused.value.claim == claim


def test_old_claims_in_a_new_report() -> None:
    with pytest.raises(PolicyError, match="claims") as refused:
        check(document(with_claims(issued_at=START - 361)))
    assert refused.value.claim == "maximum_age_s"
    with pytest.raises(PolicyError, match="claims") as refused:
        check(document(with_claims(issued_at=START + 61)))
    assert refused.value.claim == "clock_skew_s"


@pytest.mark.parametrize("expire_at", [0, START - 1, START])
def test_expired_keys(expire_at: int) -> None:
    with pytest.raises(PolicyError) as refused:
        check(document(with_claims(keys_expire_at=expire_at)))
    assert refused.value.claim == "keys_expire_at"
    assert check(document(with_claims(keys_expire_at=START + 1))).claims.keys_expire_at == START + 1


def test_the_default_refuses_what_only_a_demo_accepts() -> None:
    default = Policy.default(frozenset({bytes(48)}))
    assert "simulated" not in default.cpu.accepted
    assert default.gpu.expected == "required"
    assert default.cc_mode.accepted == {"on"}
    with pytest.raises(PolicyError):
        check(document(cpu=SimulatedCpu(clock=clock)), policy=default)


def test_an_empty_list_in_code_accepts_nothing() -> None:
    import dataclasses

    for change in (
        {"cpu": rules.Cpu(frozenset())},
        {"measurement": rules.Measurement(frozenset())},
        {"cc_mode": hardware.CcMode(frozenset())},
        {"configuration": rules.Configuration(frozenset())},
        {"software": rules.Software(frozenset())},
        {"replica": rules.Replica(frozenset())},
        {"tls": rules.Tls(frozenset())},
        {"padding": rules.Padding(frozenset())},
        {"sandbox": rules.Sandbox(frozenset())},
        {"models": rules.Models({})},
    ):
        with pytest.raises(PolicyError) as refused:
            check(document(), policy=dataclasses.replace(policy(), **change))
        assert refused.value.claim in change


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_to_be_stated(key: str) -> None:
    text = "\n".join(line for line in policy_text().splitlines() if not line.startswith(f"{key} ="))
    assert text.count("=") == policy_text().count("=") - 1
    with pytest.raises(PolicyFileError, match=rf"lacks '{key}'.*Write: {key} ="):
        Policy.from_toml(text.encode())


def policy_text() -> str:
    """Values only: comments hold equals signs too."""
    lines = Policy.accept_simulated().to_toml().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('paddin = ["pad"]', "'padding'"),
        ("max_age_s = 3", "'maximum_age_s'"),
        ("zzzz = 1", "the keys are cpu, measurement"),
        ("[model]\na = 1", "'models'"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_one(line: str, advice: str) -> None:
    with pytest.raises(PolicyFileError, match="unknown key") as refused:
        Policy.from_toml(f"{policy_text()}\n{line}\n".encode())
    assert advice in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("cpu", "[]", "Write"),
        ("cpu", '"any"', "Write"),
        ("cpu", '"simulated"', "Write"),
        ("cpu", '["simulate"]', "did you mean 'simulated'"),
        ("cpu", '["sgx"]', "sev-snp"),
        ("cpu", "[1]", "Write"),
        ("measurement", "[]", "Write"),
        ("measurement", f'["{"00" * 32}"]', "96 hexadecimal"),
        ("measurement", '"none"', "Write"),
        ("gpu", '"any"', "choose from none, required"),
        ("gpu", "17", "0 to 16"),
        ("gpu", "0", "Write"),
        ("gpu", "-1", "Write"),
        ("minimum_tcb", "{ Rome = { snp = 1 } }", "choose from Genoa, Milan, Turin"),
        ("minimum_tcb", "{ Milan = { fmc = 1 } }", "choose from bootloader"),
        ("minimum_tcb", "{ Milan = { snp = 256 } }", "0 to 255"),
        ("minimum_tcb", "{ Milan = { snp = true } }", "0 to 255"),
        ("minimum_tcb", "{ Milan = {} }", "Write"),
        ("minimum_tcb", "{}", "Write"),
        ("debug", '"off"', "choose from allowed, refused"),
        ("migration", "false", "Write"),
        ("vmpl", "[4]", "0 to 3"),
        ("vmpl", "[]", "Write"),
        ("vmpl", "0", "Write"),
        ("platform_set", '["smtt"]', "did you mean 'smt'"),
        ("platform_clear", "[]", "Write"),
        ("chips", '["00"]', "128 hexadecimal"),
        ("pcrs", '{ 24 = "00" }', "0 to 23"),
        ("pcrs", '{ 4 = "00" }', "64 hexadecimal"),
        ("pcrs", "{}", "Write"),
        ("tdx_status", '["uptodate"]', "UpToDate"),
        ("cpu_revocation", '"any"', "choose from optional, required"),
        ("gpu_architecture", '["ada"]', "choose from blackwell, hopper"),
        ("gpu_driver", "[]", "Write"),
        ("gpu_rims", '"none"', "choose from optional, required"),
        ("gpu_revocation", "1", "Write"),
        ("measurement", '{ release = "absent.json" }', "Write"),
        ("release", '"any"', "Write"),
        ("release", '{ file = "absent.json" }', "Write"),
        ("release", '{ file = "absent.json", keys = [], minimum = 1 }', "Write"),
        ("release", '{ file = "", keys = ["00"], minimum = 1 }', "Write"),
        ("release", '{ file = "absent.json", keys = ["00"], minimum = 1 }', "64 hexadecimal"),
        ("release", f'{{ file = "absent.json", keys = ["{"00" * 32}"], minimum = 1 }}', "anybody can sign"),
        ("release", f'{{ file = "absent.json", keys = ["{"03" * 32}"], minimum = -1 }}', "not a number"),
        ("release", f'{{ file = "absent.json", keys = ["{"03" * 32}"], minimum = 1 }}', "Get both from"),
        ("gpu", '["none"]', "Write"),
        ("gpu", "false", "Write"),
        ("cc_mode", '["On"]', "did you mean 'on'"),
        ("cc_mode", '"any"', "Write"),
        ("configuration", '["any"]', "64 hexadecimal"),
        ("software", "[]", "Write"),
        ("software", "1", "Write"),
        ("replica", '""', "Write"),
        ("tls", '["none"]', "64 hexadecimal"),
        ("tls", '"off"', "Write"),
        ("padding", "true", "Write"),
        ("padding", '["full"]', "choose from constant, off, pad"),
        ("sandbox", '["off"]', "choose from full, none"),
        ("maximum_age_s", "-1", "Write"),
        ("maximum_age_s", "300.0", "Write"),
        ("maximum_age_s", "true", "Write"),
        ("maximum_age_s", "nan", "Write"),
        ("maximum_age_s", '"any"', "Write"),
        ("clock_skew_s", "inf", "Write"),
    ],
)
def test_values_refused_with_what_to_write(key: str, value: str, says: str) -> None:
    with pytest.raises(PolicyFileError, match=key) as refused:
        policy(**{key: value})
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "models", ["[models]", 'models = "all"', "models = []", 'models = {a = "11"}', "[models]\na=1"]
)
def test_models_refused(models: str) -> None:
    with pytest.raises(PolicyFileError, match="models"):
        with_models(models)


@pytest.mark.parametrize("text", [b"\xff", b"cpu", b"cpu = [", b'cpu = ["simulated"]\ncpu = ["tdx"]', b"\0", b""])
def test_not_a_policy(text: bytes) -> None:
    with pytest.raises(PolicyFileError):
        Policy.from_toml(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(STATED)
    assert Policy.from_toml(path) == policy()
    with pytest.raises(PolicyFileError, match="cannot be read"):
        Policy.from_toml(tmp_path / "absent.toml")
    with pytest.raises(PolicyFileError, match="cannot be read"):
        Policy.from_toml(tmp_path)
    path.write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(PolicyFileError, match="larger"):
        Policy.from_toml(path)


@pytest.mark.parametrize(
    "original",
    [
        Policy.accept_simulated(),
        Policy.default(frozenset({b"\x01" * 48, b"\x02" * 48})),
        policy(),
        policy(tls='"none"', replica=r'["q\"uote", "back\\slash", "tab\tand\u007f"]'),
    ],
    ids=["simulated", "default", "stated", "odd text"],
)
def test_a_written_policy_reads_back(original: Policy) -> None:
    text = original.to_toml()
    assert Policy.from_toml(text.encode()) == original
    for key, (comment, _) in KEYS.items():
        assert f"\n# {comment}\n" in text, key


def test_a_policy_is_judged_only_after_the_signature() -> None:
    """So that its answer is never about something that nobody signed."""
    from adytum.attestation.document.evidence import Evidence
    from tests.unit.attestation.support import changed

    def unsigned(evidence: Evidence) -> Evidence:
        import dataclasses

        return dataclasses.replace(evidence, claims=with_claims(padding="off").encode())

    with pytest.raises(VerificationError):
        check(changed(document(), unsigned), policy=policy())
