"""What fuzzing begins with: some of every kind that is taken."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from app.pagination import encode_cursor

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROWS = [{"text": 'good, "very"\nfilm', "label": 1}, {"text": "schön", "label": 0}]


def _parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "reference": [
        b"upload:ds_0198c2",
        b"file:///data/my%20file%3F.csv",
        b"hf://lab/model@refs/pr/3",
        b"hf://datasets/lab/films@v2?config=long+texts&split=test",
        b"https://[2001:db8::1]:8443/a/b.csv?sig=%2B",
        b"s3://my.bucket/a/train%20set.csv",
    ],
    "cursor": [encode_cursor(key).encode() for key in (0, -1, 2**63, "aud_1", "ü")],
    "address": [b"https://example.com/hook", b"https://[::ffff:7f00:1]:8443/", b"http://0x7f.1/"],
    "config": [
        json.dumps(found).encode()
        for found in (
            {"model_type": "bert", "num_hidden_layers": 2, "auto_map": {"A": "b.C"}},
            {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "target_modules": ["query"]},
            {"_attn_implementation": "x/y", "text_config": {"auto_map": {}, "vocab_size": 10}},
        )
    ],
    "csv": [b'text,label\n"a, ""b""\nc",1\nd,0\n', b"\xef\xbb\xbftext,label\r\na,x\r\nb,y\r\n"],
    "jsonl": [
        "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "".join(json.dumps({"text": CHAT}) + "\n" for _ in ROWS).encode(),
    ],
    "parquet": [
        _parquet(pa.Table.from_pylist(ROWS)),
        _parquet(pa.Table.from_pylist(ROWS), compression="zstd", use_dictionary=False),
        _parquet(pa.Table.from_pylist(ROWS), compression="gzip", data_page_version="2.0"),
        _parquet(pa.table({"text": [CHAT, CHAT]})),
        _parquet(pa.table({"text": ["a", None, "b"], "label": [1.0, 2.0, None]})),
    ],
}
