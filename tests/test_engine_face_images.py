"""The engine face: images, their builds, and the registry they come from and go to."""

import base64
import io
import json
import re
import secrets
import tarfile
from collections.abc import Iterator
from urllib.parse import quote, urlencode

import pytest

from comparison import (
    JSON,
    TWIN,
    Both,
    Containers,
    Seen,
    asking,
    compares,
    http_chunks,
    in_any_order,
    progress,
    twin_names,
)
from conftest import EngineDirect, Names, Registry
from service import Runner

MISSING = "no-such-image"
TAR = {"Content-Type": "application/x-tar"}
NO_AUTH = {"X-Registry-Auth": base64.urlsafe_b64encode(b"{}").decode()}


@pytest.fixture
def both(request: pytest.FixtureRequest, runner: Runner, direct: EngineDirect) -> Iterator[Both]:
    yield from asking(request, runner, direct)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def own_image(containers: Containers, repository: str) -> None:
    """An image of one layer that no other image has, some of it compressible and some not."""
    content = tar_of(data=secrets.token_bytes(200_000), more=bytes(200_000))
    imported = containers.do("POST", "/images/create?fromSrc=-", 200, data=content)["status"]
    # Podman does not name what it imports by the tag that is given.
    containers.do("POST", f"/images/{imported}/tag?repo={quote(repository)}&tag=1", 201)


@pytest.fixture(scope="module")
def own(containers: Containers, names: Names) -> str:
    """An image that no test changes."""
    repository = names("image")
    own_image(containers, repository)
    return f"{repository}:1"


@pytest.fixture(scope="module")
def published(containers: Containers, names: Names, registry: Registry) -> str:
    """The repository of an image that is in the registry, with the tag 1."""
    repository = f"{registry.address}/{names('published')}"
    own_image(containers, repository)
    containers.do("POST", f"/images/{repository}/push?tag=1", 200, headers=NO_AUTH)
    containers.do("DELETE", f"/images/{repository}:1", 200)
    return repository


def without_digest(seen: Seen) -> object:
    """A view of a push's progress: the images differ, so their digests do (and their layers' ids are masked)."""
    status, fields, lines, layers = progress(seen)
    text = re.sub(r"sha256:\w+", "DIGEST", json.dumps([line for line in lines if "aux" not in line]))
    return status, fields, re.sub(r"size: \d+", "size", text), layers


def without_temporary_name(seen: Seen) -> object:
    """A view of an error that may name a temporary folder of the engine's."""
    fields = [field for field in seen.headers if field[0] != "content-length"]
    return seen.status, fields, re.sub(rb"docker-import-\d+", b"FOLDER", seen.body)


class TestReading:
    @compares("ImageList")
    @pytest.mark.parametrize("query", ["", "?all=1&digests=1", "?filters=%7B%22dangling%22%3A%5B%22true%22%5D%7D"])
    def test_list_relays_the_engines_json(self, both: Both, own: str, query: str) -> None:
        assert both.same("GET", f"/v1.41/images/json{query}", view=in_any_order).status == 200

    @compares("ImageList")
    def test_list_with_a_bad_filter_relays_the_engines_error(self, both: Both) -> None:
        assert both.same("GET", "/images/json?filters=nonsense").status in (400, 500)

    @compares("ImageInspect")
    def test_inspect_takes_a_name_of_several_segments(self, both: Both, image: str) -> None:
        assert "/" in image
        assert both.same("GET", f"/v1.41/images/{image}/json").status == 200

    @compares("ImageInspect")
    def test_inspect_takes_an_encoded_slash_an_id_and_its_prefix(self, both: Both, image: str) -> None:
        found = both.same("GET", f"/images/{quote(image, safe='')}/json").json["Id"]
        assert both.same("GET", f"/images/{found}/json").json["Id"] == found
        assert both.same("GET", f"/images/{found.removeprefix('sha256:')[:12]}/json").json["Id"] == found

    @compares("ImageHistory")
    def test_history_relays_the_layers(self, both: Both, image: str) -> None:
        assert len(both.same("GET", f"/images/{image}/history").json) == 1

    @pytest.mark.parametrize(
        ("method", "target"),
        [
            ("GET", f"/images/{MISSING}/json"),
            ("GET", f"/images/{MISSING}/history"),
            ("GET", f"/images/{MISSING}:tag/get"),
            ("GET", f"/images/get?names={MISSING}"),
            ("POST", f"/images/{MISSING}/tag?repo=a"),
            ("DELETE", f"/images/some/where/{MISSING}"),
        ],
    )
    def test_whatever_is_asked_of_a_missing_image_relays_the_engines_error(
        self, both: Both, method: str, target: str
    ) -> None:
        assert both.same(method, target, headers=NO_AUTH).status in (404, 500)

    @compares("ImageSearch")
    @pytest.mark.parametrize("query", ["", "term=busybox&limit=1000", "term=busybox&filters=nonsense"])
    def test_search_refused_by_the_engine_relays_its_error(self, both: Both, query: str) -> None:
        assert both.same("GET", f"/images/search?{query}").status >= 400

    @compares("ImageSearch")
    def test_search_in_a_registry_that_has_none_relays_its_error(self, both: Both, registry: Registry) -> None:
        assert both.same("GET", f"/images/search?term={registry.address}/busybox").status >= 400


class TestChanging:
    @compares("ImageTag")
    def test_tag_relays_201(self, both: Both, own: str, names: Names) -> None:
        seen = both.twins("POST", f"/images/{own}/tag?repo=some/{TWIN}&tag=2", twin_names(names, "tag"))
        assert (seen.status, seen.body) == (201, b"")

    @compares("ImageTag")
    def test_tag_with_a_malformed_name_relays_the_engines_error(self, both: Both, own: str) -> None:
        assert both.same("POST", f"/images/{own}/tag?repo=UPPER&tag=%20").status in (400, 500)

    @compares("ImageDelete")
    def test_delete_relays_what_was_untagged(self, both: Both, containers: Containers, own: str, names: Names) -> None:
        pair = twin_names(names, "untag")
        for name in pair:
            containers.do("POST", f"/images/{own}/tag?repo=some/{name}&tag=2", 201)
        seen = both.twins("DELETE", f"/images/some/{TWIN}:2", pair)
        assert seen.json == [{"Untagged": f"some/{pair[1]}:2"}]

    @compares("ImageDelete")
    def test_delete_of_an_image_in_use_relays_409(self, both: Both, containers: Containers, names: Names) -> None:
        repository = names("used")
        own_image(containers, repository)
        containers(start=False, Image=f"{repository}:1")
        assert both.same("DELETE", f"/images/{repository}:1").status == 409

    @compares("ImageCommit")
    def test_commit_relays_201_with_the_new_id(self, both: Both, containers: Containers, names: Names) -> None:
        name = containers.ended("touch", "/made")
        target = f"/commit?container={name}&repo={TWIN}&comment=c&changes={quote('ENV a=b')}"
        seen = both.twins("POST", target, twin_names(names, "commit"), b'{"Labels":{"c":"d"}}', JSON)
        assert seen.status == 201
        config = both.engine("GET", f"/images/{seen.json['Id']}/json").json["Config"]
        assert config["Labels"]["c"] == "d"
        assert "a=b" in config["Env"]

    @compares("ImageCommit")
    def test_commit_refused_by_the_engine_relays_its_error(self, both: Both, containers: Containers) -> None:
        name = containers(start=False)
        assert both.same("POST", "/commit?container=no-such", b"{}", JSON).status == 404
        assert both.same("POST", f"/commit?container={name}&changes=NONSENSE", b"{}", JSON).status in (400, 500)
        assert both.same("POST", f"/commit?container={name}", b"{", JSON).status in (400, 500)

    @compares("ImagePrune")
    def test_prune_removes_what_its_filter_names(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "prune")
        container = containers(start=False)
        for label in pair:
            body = {"Labels": {**names.labels, "twin": label}}
            containers.do("POST", f"/commit?container={container}", 201, json=body)
        filters = urlencode({"filters": json.dumps({"label": [f"twin={TWIN}"], "dangling": ["true"]})})
        seen = both.twins("POST", f"/images/prune?{filters}", pair)
        assert len(seen.json["ImagesDeleted"]) >= 1

    @compares("ImagePrune", "BuildPrune")
    def test_prune_of_nothing_relays_the_empty_answer(self, both: Both, names: Names) -> None:
        filters = urlencode({"filters": json.dumps({"label": [f"twin={names()}"]})})
        assert both.same("POST", f"/images/prune?{filters}").json["SpaceReclaimed"] == 0
        filters = urlencode({"filters": json.dumps({"id": [names()]})})
        assert both.same("POST", f"/v1.41/build/prune?{filters}").json["SpaceReclaimed"] == 0

    @compares("ImagePrune", "BuildPrune")
    def test_prune_with_a_bad_filter_relays_the_engines_error(self, both: Both) -> None:
        assert both.same("POST", "/images/prune?filters=nonsense").status in (400, 500)
        assert both.same("POST", "/build/prune?filters=nonsense").status in (400, 500)


def members(seen: Seen) -> tuple[int, list[tuple[str, str]], dict[str, object]]:
    """A view of an archive of images that does not look at their order."""
    found: dict[str, object] = {}
    with tarfile.open(fileobj=io.BytesIO(seen.body)) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            content = file.read() if file is not None else b""
            found[member.name] = sorted(content) if member.name in ("manifest.json", "repositories") else content
    return seen.status, seen.headers, found


class TestArchives:
    @compares("ImageGet")
    def test_an_image_is_downloaded_byte_for_byte(self, both: Both, own: str) -> None:
        seen = both.same("GET", f"/images/{own}/get")
        with tarfile.open(fileobj=io.BytesIO(seen.body)) as tar:
            assert "manifest.json" in tar.getnames()

    @compares("ImageGetAll")
    def test_several_images_are_downloaded_member_for_member(self, both: Both, own: str, image: str) -> None:
        # The engine writes several images in an order that is chance.
        seen = both.same("GET", f"/v1.41/images/get?names={own}&names={quote(image, safe='')}", view=members)
        with tarfile.open(fileobj=io.BytesIO(seen.body)) as tar:
            manifest = tar.extractfile("manifest.json")
            assert manifest is not None
            assert {tag for found in json.load(manifest) for tag in found["RepoTags"]} == {own, image}

    @compares("ImageLoad")
    def test_what_was_downloaded_is_loaded_again(self, both: Both, containers: Containers, names: Names) -> None:
        repository = names("load")
        own_image(containers, repository)
        found = containers.do("GET", f"/images/{repository}:1/json", 200)["Id"]
        archive = both.runner.request("GET", f"/images/{repository}:1/get").body
        seen = []
        for ask in (both.engine, both.through):
            containers.do("DELETE", f"/images/{repository}:1", 200)
            seen.append(progress(ask("POST", "/images/load?quiet=0", archive, {"Content-Type": "application/x-tar"})))
            assert containers.do("GET", f"/images/{repository}:1/json", 200)["Id"] == found
        assert seen[0] == seen[1]

    @compares("ImageLoad")
    @pytest.mark.parametrize("body", [b"no tar", b"", tar_of(something=b"else")])
    def test_a_load_that_the_engine_refuses_relays_its_error(self, both: Both, body: bytes) -> None:
        seen = both.same("POST", "/images/load?quiet=1", body, view=without_temporary_name)
        assert seen.status != 200 or b"errorDetail" in seen.body or not seen.body

    @compares("ImageCreate")
    def test_a_tar_is_imported(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "import")
        target = f"/v1.41/images/create?fromSrc=-&repo={TWIN}&tag=1&changes={quote('CMD a')}"
        seen = both.twins("POST", target, pair, tar_of(file=b"content"))
        assert seen.status == 200
        assert containers.do("GET", f"/images/{pair[1]}:1/json", 200)["Config"]["Cmd"] == ["/bin/sh", "-c", "a"]

    @compares("ImageCreate")
    def test_an_import_that_the_engine_refuses_relays_its_error(self, both: Both, names: Names) -> None:
        assert both.same("POST", "/images/create?fromSrc=-&repo=UPPER", tar_of(file=b"content")).status in (400, 500)
        assert both.same("POST", "/images/create").status in (400, 500)


class TestRegistry:
    @compares("ImageCreate")
    def test_a_pull_relays_its_progress(self, both: Both, containers: Containers, published: str) -> None:
        target = f"/v1.41/images/create?fromImage={quote(published, safe='')}&tag=1"
        seen = []
        for ask in (both.engine, both.through):
            seen.append(progress(ask("POST", target)))
            containers.do("DELETE", f"/images/{published}:1", 200)
        assert seen[0] == seen[1]
        assert "Downloaded newer image" in json.dumps(seen)

    def test_the_progress_of_a_pull_leaves_in_whole_lines(
        self, runner: Runner, containers: Containers, published: str
    ) -> None:
        chunks = list(http_chunks(runner, "POST", f"/images/create?fromImage={quote(published, safe='')}&tag=1"))
        assert chunks
        for chunk in chunks:
            assert chunk.endswith(b"\n")
            assert all(json.loads(line) for line in chunk.splitlines())
        containers.do("DELETE", f"/images/{published}:1", 200)

    @compares("ImageCreate")
    def test_a_pull_of_a_missing_tag_or_image_relays_404(self, both: Both, published: str, registry: Registry) -> None:
        missing = f"{registry.address}/{MISSING}"
        assert both.same("POST", f"/images/create?fromImage={quote(published, safe='')}&tag=no-such").status == 404
        assert both.same("POST", f"/images/create?fromImage={quote(missing, safe='')}&tag=1").status == 404

    @compares("ImageCreate")
    def test_a_pull_from_a_registry_that_does_not_answer_relays_500(self, both: Both) -> None:
        assert both.same("POST", "/images/create?fromImage=127.0.0.1%3A1%2Fa&tag=1").status == 500

    @compares("ImagePush")
    def test_a_push_relays_its_progress(
        self, both: Both, containers: Containers, names: Names, registry: Registry
    ) -> None:
        pair = twin_names(names, "push")
        for name in pair:
            own_image(containers, f"{registry.address}/{name}")
        target = f"/v1.41/images/{registry.address}/{TWIN}/push?tag=1"
        seen = both.twins("POST", target, pair, headers=NO_AUTH, view=without_digest)
        assert b'"Digest":"sha256:' in seen.body
        assert both.engine("GET", f"/distribution/{registry.address}/{pair[1]}:1/json").status == 200

    @compares("ImagePush")
    def test_a_push_without_credentials_relays_400(self, both: Both, own: str) -> None:
        assert both.same("POST", f"/images/{own}/push").status == 400

    @compares("ImagePush")
    def test_an_error_within_a_pushs_progress_is_relayed(self, both: Both, containers: Containers, own: str) -> None:
        containers.do("POST", f"/images/{own}/tag?repo=127.0.0.1:1/some&tag=1", 201)
        seen = both.same("POST", "/images/127.0.0.1:1/some/push?tag=1", headers=NO_AUTH, view=progress)
        containers.do("DELETE", "/images/127.0.0.1:1/some:1", 200)
        assert seen.status == 200
        assert b"errorDetail" in seen.body

    @compares("DistributionInspect")
    def test_distribution_inspect_relays_the_registrys_descriptor(self, both: Both, published: str) -> None:
        seen = both.same("GET", f"/v1.41/distribution/{published}:1/json")
        assert seen.json["Descriptor"]["digest"].startswith("sha256:")
        digest = seen.json["Descriptor"]["digest"]
        assert both.same("GET", f"/distribution/{published}@{digest}/json").status == 200

    @compares("DistributionInspect")
    def test_distribution_inspect_of_a_missing_image_relays_the_engines_error(
        self, both: Both, registry: Registry
    ) -> None:
        assert both.same("GET", f"/distribution/{registry.address}/{MISSING}/json").status >= 400

    @compares("SystemAuth")
    def test_auth_relays_the_registrys_word(self, both: Both, registry: Registry) -> None:
        body = json.dumps({"username": "a", "password": "b", "serveraddress": registry.address}).encode()
        assert both.same("POST", "/v1.41/auth", body, JSON).json["Status"] == "Login Succeeded"

    @compares("SystemAuth")
    @pytest.mark.parametrize("body", [b'{"username":"a","password":"b","serveraddress":"127.0.0.1:1"}', b"{"])
    def test_auth_refused_by_the_engine_relays_its_error(self, both: Both, body: bytes) -> None:
        assert both.same("POST", "/auth", body, JSON).status in (400, 500)


class TestBuild:
    @compares("ImageBuild")
    def test_a_build_relays_its_output(self, both: Both, containers: Containers, image: str, names: Names) -> None:
        pair = twin_names(names, "build")
        dockerfile = f"FROM {image}\nLABEL a=b\nRUN echo built; touch /made\n"
        labels = quote(json.dumps(names.labels))
        target = f"/v1.41/build?t={TWIN}&nocache=1&networkmode=none&labels={labels}"
        seen = both.twins("POST", target, pair, tar_of(Dockerfile=dockerfile.encode()), TAR)
        assert seen.status == 200
        assert all(json.loads(line) for line in seen.body.splitlines())
        assert containers.do("GET", f"/images/{pair[1]}/json", 200)["Config"]["Labels"] == {"a": "b", **names.labels}

    @compares("ImageBuild")
    def test_a_build_that_fails_says_so_within_its_output(self, both: Both, image: str, names: Names) -> None:
        body = tar_of(Dockerfile=f"FROM {image}\nRUN exit 7\n".encode())
        target = f"/build?t={TWIN}&nocache=1&networkmode=none&forcerm=1"
        seen = both.twins("POST", target, twin_names(names, "build"), body, TAR)
        assert b'"errorDetail":{"code":7' in seen.body

    @compares("ImageBuild")
    @pytest.mark.parametrize(
        ("query", "body"),
        [
            ("", tar_of(something=b"else")),
            ("", tar_of(Dockerfile=b"NONSENSE\n")),
            ("", tar_of(Dockerfile=b"")),
            ("buildargs=nonsense", b""),
            ("t=UPPER", tar_of(Dockerfile=b"FROM scratch\n")),
            ("remote=http://127.0.0.1:1/", b""),
        ],
    )
    def test_a_build_that_the_engine_refuses_relays_its_error(self, both: Both, query: str, body: bytes) -> None:
        seen = both.same("POST", f"/build?{query}", body, TAR)
        assert seen.status >= 400 or b"errorDetail" in seen.body
