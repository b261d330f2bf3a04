"""How models and datasets are named, and that a path cannot leave the allowed folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.references import (
    FileReference,
    HubDatasetReference,
    HubModelReference,
    InvalidReference,
    ObjectReference,
    Reference,
    UploadReference,
    WebReference,
    check_object,
    parse_dataset_reference,
    parse_model_reference,
    parse_reference,
    resolve_file,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("upload:ds_0198c2", UploadReference("ds_0198c2")),
        ("file:///data/train.csv", FileReference(Path("/data/train.csv"))),
        ("file:///data/model/", FileReference(Path("/data/model"))),
        ("file:///data/my%20file%3F.csv", FileReference(Path("/data/my file?.csv"))),
        ("hf://lab/model", HubModelReference("lab/model", "main")),
        ("hf://lab/model@v1.0", HubModelReference("lab/model", "v1.0")),
        ("hf://lab/model@refs/pr/3", HubModelReference("lab/model", "refs/pr/3")),
        (f"hf://lab/model@{COMMIT}", HubModelReference("lab/model", COMMIT)),
        ("hf://datasets/lab/films", HubDatasetReference("lab/films", "main", None, "train")),
        (
            "hf://datasets/lab/films@v2?config=long+texts&split=test",
            HubDatasetReference("lab/films", "v2", "long texts", "test"),
        ),
        ("hf://datasets/lab/films?split=a.b", HubDatasetReference("lab/films", split="a.b")),
        (
            "https://example.com/a/b.csv?sig=%2B",
            WebReference("https://example.com/a/b.csv?sig=%2B"),
        ),
        ("https://[2001:db8::1]:8443/a", WebReference("https://[2001:db8::1]:8443/a")),
        ("s3://my.bucket/a/train%20set.csv", ObjectReference("my.bucket", "a/train set.csv")),
        ("s3://bucket/model/", ObjectReference("bucket", "model")),
    ],
)
def test_accepted_forms(text: str, reference: Reference) -> None:
    """Every form is understood, and writing it out and reading it again changes nothing."""
    assert parse_reference(text) == reference
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a reference"),
        ("/data/train.csv", "not a reference"),
        ("http://example.com/train.csv", "not a reference"),
        ("gs://bucket/train.csv", "not a reference"),
        ("S3://bucket/train.csv", "not a reference"),
        ("https://example.com", "names no file"),
        ("https://example.com/", "names no file"),
        ("https://example.com/folder/?x=1", "names no file"),
        ("https:///train.csv", "names no host"),
        ("https://a..b/train.csv", "names no host"),
        ("https://[::1/train.csv", "names no host"),
        ("https://[1]/train.csv", "names no host"),
        ("https://exämple.com/train.csv", "percent-encoded"),
        ("https://example.com\\@inside/train.csv", "percent-encoded"),
        ("https://user:secret@example.com/train.csv", "user or a password"),
        ("https://example.com/train.csv#part", "fragment"),
        ("https://example.com:22/train.csv", "port 22 is not called"),
        ("https://example.com:80/train.csv", "port 80 is not called"),
        ("https://example.com:/train.csv", "is not called"),
        ("https://example.com:99999/train.csv", "is not called"),
        ("https://example.com/%zz.csv", "hexadecimal"),
        ("s3://bucket", "key may not be empty"),
        ("s3://bucket/", "key may not be empty"),
        ("s3://bucket/a//b", "key may not be empty"),
        ("s3://bucket/a/../b", "key may not be empty"),
        ("s3://bucket/a/%2e%2e/b", "key may not be empty"),
        ("s3://bucket/a?versionId=1", "takes no options"),
        ("s3://Bucket/a", "does not name a bucket"),
        ("s3://b/a", "does not name a bucket"),
        ("s3://169.254.169.254/a", "does not name a bucket"),
        ("s3://a..b/a", "does not name a bucket"),
        ("s3://key:secret@bucket/a", "does not name a bucket"),
        ("s3://evil.com:9000/a", "does not name a bucket"),
        ("HF://lab/model", "not a reference"),
        ("upload:", "upload:ds_"),
        ("upload:aud_1", "upload:ds_"),
        ("upload:ds_../x", "upload:ds_"),
        ("file://train.csv", "absolute"),
        ("file://localhost/train.csv", "absolute"),
        ("file:///", "may not hold"),
        ("file:///data//train.csv", "may not hold"),
        ("file:///data/../etc/passwd", "may not hold"),
        ("file:///data/%2e%2e/etc/passwd", "may not hold"),
        ("file:///data/%2E%2E%2Fetc", "may not hold"),
        ("file:///data/x%00.csv", "unprintable"),
        ("file:///data/x%ff.csv", "not UTF-8"),
        ("file:///data/x%zz.csv", "hexadecimal"),
        ("file:///data/x.csv?split=a", "takes no options"),
        ("file:///data/x\n.csv", "unprintable"),
        ("file:///" + "x" * 2000, "at most 1,024"),
        ("file:///" + "ü" * 400, "percent-encoded, .* more than 1,024"),
        ("hf://model", "owner/name"),
        ("hf://lab/model/file", "owner/name"),
        ("hf://lab/../model", "owner/name"),
        ("hf://lab/mo--del", "owner/name"),
        ("hf://lab/model.git", "owner/name"),
        ("hf://-lab/model", "owner/name"),
        ("hf://lab/" + "m" * 97, "owner/name"),
        ("hf://lab/model@", "branch, tag or commit"),
        ("hf://lab/model@../../x", "branch, tag or commit"),
        ("hf://lab/model@a@b", "branch, tag or commit"),
        ("hf://lab/model?split=test", "takes no options"),
        ("hf://datasets/films", "owner/name"),
        ("hf://datasets/lab/films?shard=1", "not an option"),
        ("hf://datasets/lab/films?", "not an option"),
        ("hf://datasets/lab/films?split=a&split=b", "twice"),
        ("hf://datasets/lab/films?split=", "not a split"),
        ("hf://datasets/lab/films?split=train[:10]", "not a split"),
        ("hf://datasets/lab/films?config=../x", "configuration"),
        ("hf://datasets/lab/films?config=", "configuration"),
    ],
)
def test_everything_else_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(InvalidReference, match=message):
        parse_reference(text)


def test_the_refusal_names_the_forms_that_there_are() -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference("model.bin")
    for form in ("upload:ds_", "file:///", "hf://owner/name@revision", "https://", "s3://"):
        assert form in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="hfile:/.%2@?=&datasets-_0", max_size=60))
def test_no_text_breaks_the_parser(text: str) -> None:
    """Any text is a reference that can be written out again, or an InvalidReference."""
    for prefix in (
        "",
        "hf://",
        "hf://datasets/a/b",
        "file:///",
        "upload:ds_",
        "https://a/",
        "s3://bkt/",
    ):
        try:
            reference = parse_reference(prefix + text)
        except InvalidReference:
            continue
        assert parse_reference(str(reference)) == reference


def test_a_model_is_not_a_dataset() -> None:
    assert parse_model_reference("hf://lab/model") == HubModelReference("lab/model")
    assert parse_dataset_reference("hf://datasets/a/b") == HubDatasetReference("a/b")
    with pytest.raises(InvalidReference, match="names a dataset where a model"):
        parse_model_reference("upload:ds_1")
    with pytest.raises(InvalidReference, match="names a model where a dataset"):
        parse_dataset_reference("hf://lab/model")


class TestRoots:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "root"
        root.mkdir()
        (root / "train.csv").touch()
        (tmp_path / "secret.csv").touch()
        return root

    def test_what_lies_under_a_root_is_found(self, root: Path, tmp_path: Path) -> None:
        assert resolve_file(root / "train.csv", [tmp_path / "other", root]) == root / "train.csv"
        assert resolve_file(root, [root]) == root

    def test_a_root_may_itself_be_a_link(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "alias").symlink_to(root)
        expected = (root / "train.csv").resolve()
        assert resolve_file(tmp_path / "alias" / "train.csv", [tmp_path / "alias"]) == expected

    def test_a_link_within_the_roots_is_followed(self, root: Path) -> None:
        (root / "link.csv").symlink_to("train.csv")
        assert resolve_file(root / "link.csv", [root]) == root / "train.csv"

    @pytest.mark.parametrize(
        "path", ["../secret.csv", "../none.csv", "link.csv", "folder/secret.csv"]
    )
    def test_nothing_outside_is_reached(self, root: Path, tmp_path: Path, path: str) -> None:
        """Not by dots, not by links; and the answer is the same where nothing is there."""
        (root / "link.csv").symlink_to(tmp_path / "secret.csv")
        (root / "folder").symlink_to(tmp_path)
        with pytest.raises(InvalidReference, match="outside the folders"):
            resolve_file(root / path, [root])

    def test_a_folder_whose_name_begins_like_a_root_is_outside(
        self, root: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "root2").mkdir()
        with pytest.raises(InvalidReference, match="outside the folders"):
            resolve_file(tmp_path / "root2", [root])

    def test_refusals_name_the_path_as_it_was_given(self, root: Path) -> None:
        (root / "loop").symlink_to("loop")
        for path, roots, message in [
            (root / "none.csv", [root], "no such file"),
            (root / "train.csv" / "x", [root], "no such file"),
            (root / "loop", [root], "cannot be resolved|no such file"),
            (root / "nul\0.csv", [root], "cannot be resolved"),
            (root / ("x" * 300), [root], "cannot be resolved|no such file"),
            (root / "train.csv", [], "WINNOW_FILE_ROOTS"),
            (Path("train.csv"), [root], "not absolute"),
        ]:
            with pytest.raises(InvalidReference, match=message) as caught:
                resolve_file(path, roots)
            assert str(path) in str(caught.value)


@pytest.mark.parametrize("root", ["bucket", "bucket/a", "bucket/a/b.csv"])
def test_an_object_below_a_root_may_be_read(root: str) -> None:
    check_object(ObjectReference("bucket", "a/b.csv"), ["other", root])


@pytest.mark.parametrize("root", ["buck", "bucket/a/b", "bucket/b", "bucket/a/b.csv/c", "a/b.csv"])
def test_an_object_elsewhere_may_not(root: str) -> None:
    with pytest.raises(InvalidReference, match="outside the buckets"):
        check_object(ObjectReference("bucket", "a/b.csv"), [root])


def test_without_roots_no_object_is_read() -> None:
    with pytest.raises(InvalidReference, match="WINNOW_S3_ROOTS"):
        check_object(ObjectReference("bucket", "a/b.csv"), [])
