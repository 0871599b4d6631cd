"""The engine face on Podman: images; see the file of this name above."""

import json
import re
from urllib.parse import quote, urlencode

import pytest
import test_engine_face_images as docker
from test_engine_face_images import *

from comparison import JSON, TWIN, Both, Containers, Seen, compares, progress, twin_names
from conftest import Names, Registry
from on_podman.differences import instead_of


def without_temporary_names(seen: Seen) -> object:
    """A view of an error that names temporary files; with those goes its length."""
    fields = [field for field in seen.headers if field[0] != "content-length"]
    return seen.status, fields, re.sub(rb"(api_load\.tar|/oci|libpod_builder|docker-tar)\d+", rb"\1", seen.body)


@instead_of(docker.TestChanging.test_tag_relays_201, "tag")
@compares("ImageTag")
def test_tag_relays_201(both: Both, own: str, names: Names) -> None:
    seen = both.twins("POST", f"/images/{own}/tag?repo=some/{TWIN}&tag=2", twin_names(names, "tag"))
    assert (seen.status, seen.body) == (201, b"\n")


@instead_of(docker.TestChanging.test_delete_relays_what_was_untagged, "full-names")
@compares("ImageDelete")
def test_delete_relays_what_was_untagged(both: Both, containers: Containers, own: str, names: Names) -> None:
    pair = twin_names(names, "untag")
    for name in pair:
        containers.do("POST", f"/images/{own}/tag?repo=some/{name}&tag=2", 201)
    assert both.twins("DELETE", f"/images/some/{TWIN}:2", pair).json == [{"Untagged": f"localhost/some/{pair[1]}:2"}]


@instead_of(docker.TestChanging.test_commit_relays_201_with_the_new_id, "commit")
@compares("ImageCommit")
def test_commit_relays_201_with_the_new_id(both: Both, containers: Containers, names: Names) -> None:
    name = containers.ended("touch", "/made")
    changes = quote("ENV a=b\nLABEL e=f")
    target = f"/commit?container={name}&repo={TWIN}&comment=c&changes={changes}"
    seen = both.twins("POST", target, twin_names(names, "commit"), b'{"Labels":{"c":"d"}}', JSON)
    assert seen.status == 201
    config = both.engine("GET", f"/images/{seen.json['Id']}/json").json["Config"]
    assert "c" not in config["Labels"]
    assert "a=b" in config["Env"]


@instead_of(docker.TestChanging.test_prune_removes_what_its_filter_names, "commit")
@compares("ImagePrune")
def test_prune_removes_what_its_filter_names(both: Both, containers: Containers, names: Names) -> None:
    pair = twin_names(names, "prune")
    container = containers(start=False)
    for label in pair:
        containers.do("POST", f"/commit?container={container}&changes={quote(f'LABEL twin={label}')}", 201, json={})
    filters = urlencode({"filters": json.dumps({"label": [f"twin={TWIN}"], "dangling": ["true"]})})

    def without_size(seen: Seen) -> object:
        # An image holds times, of which one may be written shorter than another.
        return seen.status, seen.headers, re.sub(rb'"SpaceReclaimed":\d+', b"", seen.body)

    assert len(both.twins("POST", f"/images/prune?{filters}", pair, view=without_size).json["ImagesDeleted"]) >= 1


@instead_of(docker.TestChanging.test_prune_of_nothing_relays_the_empty_answer, "absent")
@compares("ImagePrune", "BuildPrune")
def test_prune_of_nothing_relays_the_empty_answer(both: Both, names: Names) -> None:
    filters = urlencode({"filters": json.dumps({"label": [f"twin={names()}"]})})
    assert both.same("POST", f"/images/prune?{filters}").json["SpaceReclaimed"] == 0
    seen = both.same("POST", "/v1.41/build/prune")
    assert (seen.status, seen.body) == (404, b"Not Found\n")


@instead_of(docker.TestChanging.test_prune_with_a_bad_filter_relays_the_engines_error, "absent")
@compares("ImagePrune", "BuildPrune")
def test_prune_with_a_bad_filter_relays_the_engines_error(both: Both) -> None:
    assert both.same("POST", "/images/prune?filters=nonsense").status == 500
    assert both.same("POST", "/build/prune?filters=nonsense").body == b"Not Found\n"


@instead_of(docker.TestArchives.test_several_images_are_downloaded_member_for_member, "full-names")
@compares("ImageGetAll")
def test_several_images_are_downloaded_member_for_member(both: Both, own: str, image: str) -> None:
    seen = both.same("GET", f"/v1.41/images/get?names={own}&names={quote(image, safe='')}", view=docker.members)
    assert image.startswith("localhost/")
    assert f'"localhost/{own}"'.encode() in seen.body


@instead_of(docker.TestArchives.test_a_load_that_the_engine_refuses_relays_its_error, "temporary")
@compares("ImageLoad")
@pytest.mark.parametrize("body", [b"no tar", b"", docker.tar_of(something=b"else")])
def test_a_load_that_the_engine_refuses_relays_its_error(both: Both, body: bytes) -> None:
    seen = both.same("POST", "/images/load?quiet=1", body, view=without_temporary_names)
    assert seen.status == 500
    assert b"/tmp/api_load.tar" in seen.body


@instead_of(docker.TestArchives.test_a_tar_is_imported, "import")
@compares("ImageCreate")
def test_a_tar_is_imported(both: Both, containers: Containers, names: Names) -> None:
    pair = twin_names(names, "import")
    target = f"/v1.41/images/create?fromSrc=-&repo={TWIN}&tag=1&changes={quote('CMD a')}"
    assert both.twins("POST", target, pair, docker.tar_of(file=b"content")).status == 200
    containers.do("GET", f"/images/{pair[1]}:1/json", 404)
    found = containers.do("GET", f"/images/{pair[1]}:latest/json", 200)
    assert found["Config"]["Cmd"] == ["/bin/sh", "-c", "a"]


@instead_of(docker.TestArchives.test_an_import_that_the_engine_refuses_relays_its_error, "import")
@compares("ImageCreate")
def test_an_import_that_the_engine_refuses_relays_its_error(both: Both) -> None:
    seen = both.same("POST", "/images/create?fromSrc=-&repo=UPPER", docker.tar_of(file=b"content"))
    assert (seen.status, seen.json["cause"]) == (500, "repository name must be lowercase")
    assert both.same("POST", "/images/create").status == 405


@instead_of(docker.TestRegistry.test_a_pull_relays_its_progress, "progress")
@compares("ImageCreate")
def test_a_pull_relays_its_progress(both: Both, containers: Containers, published: str) -> None:
    target = f"/v1.41/images/create?fromImage={quote(published, safe='')}&tag=1"
    seen = []
    for ask in (both.engine, both.through):
        seen.append(progress(ask("POST", target)))
        containers.do("DELETE", f"/images/{published}:1", 200)
    assert seen[0] == seen[1]
    assert "Download complete" in json.dumps(seen)
    assert "Downloaded newer image" not in json.dumps(seen)


def failed_within(seen: Seen) -> None:
    """A progress that tells of an error."""
    assert seen.status == 200
    last = json.loads(seen.body.splitlines()[-1])
    assert last["error"] == last["errorDetail"]["message"]


@instead_of(docker.TestRegistry.test_a_pull_of_a_missing_tag_or_image_relays_404, "pull-errors")
@compares("ImageCreate")
def test_a_pull_of_a_missing_tag_or_image_fails_within_its_progress(
    both: Both, published: str, registry: Registry
) -> None:
    missing = f"{registry.address}/{docker.MISSING}"
    failed_within(both.same("POST", f"/images/create?fromImage={quote(published, safe='')}&tag=no-such"))
    failed_within(both.same("POST", f"/images/create?fromImage={quote(missing, safe='')}&tag=1"))


@instead_of(docker.TestRegistry.test_a_pull_from_a_registry_that_does_not_answer_relays_500, "pull-errors")
@compares("ImageCreate")
def test_a_pull_from_a_registry_that_does_not_answer_fails_within_its_progress(both: Both) -> None:
    failed_within(both.same("POST", "/images/create?fromImage=127.0.0.1%3A1%2Fa&tag=1"))


@instead_of(docker.TestRegistry.test_a_push_relays_its_progress, "progress")
@compares("ImagePush")
def test_a_push_relays_its_progress(both: Both, containers: Containers, names: Names, registry: Registry) -> None:
    pair = twin_names(names, "push")
    for name in pair:
        docker.own_image(containers, f"{registry.address}/{name}")
    target = f"/v1.41/images/{registry.address}/{TWIN}/push?tag=1"
    seen = both.twins("POST", target, pair, headers=docker.NO_AUTH, view=docker.without_digest)
    assert b'"status":"1: digest: sha256:' in seen.body
    assert b'"aux"' not in seen.body


@instead_of(docker.TestRegistry.test_a_push_without_credentials_relays_400, "push")
@compares("ImagePush")
def test_a_push_without_credentials_is_tried(both: Both, containers: Containers, published: str) -> None:
    containers.do("POST", f"/images/create?fromImage={quote(published, safe='')}&tag=1", 200)
    seen = both.same("POST", f"/images/{published}/push?tag=1", view=progress)
    containers.do("DELETE", f"/images/{published}:1", 200)
    assert seen.status == 200
    assert b"digest: sha256:" in seen.body


@instead_of(docker.TestRegistry.test_distribution_inspect_relays_the_registrys_descriptor, "absent")
@compares("DistributionInspect")
def test_there_is_no_inspect_of_a_distribution(both: Both, published: str) -> None:
    assert both.same("GET", f"/v1.41/distribution/{published}:1/json").body == b"Not Found\n"


@instead_of(docker.TestRegistry.test_auth_relays_the_registrys_word, "auth")
@compares("SystemAuth")
def test_auth_relays_the_engines_error(both: Both, registry: Registry) -> None:
    body = json.dumps({"username": "a", "password": "b", "serveraddress": registry.address}).encode()
    seen = both.same("POST", "/v1.41/auth", body, JSON)
    assert seen.status == 500
    assert "HTTPS" in seen.json["message"]


@instead_of(docker.TestBuild.test_a_build_relays_its_output, "progress")
@compares("ImageBuild")
def test_a_build_relays_its_output(both: Both, containers: Containers, image: str, names: Names) -> None:
    pair = twin_names(names, "build")
    dockerfile = f"FROM {image}\nLABEL a=b\nRUN echo built; touch /made\n"
    labels = quote(json.dumps(names.labels))
    target = f"/v1.41/build?t={TWIN}&nocache=1&networkmode=none&labels={labels}"

    def view(seen: Seen) -> object:
        # The ids of the steps' images, which have 11 digits there.
        return seen.status, seen.headers, re.sub(rb"\\u003e [0-9a-f]{11}\\n", b"> ID", seen.body)

    seen = both.twins("POST", target, pair, docker.tar_of(Dockerfile=dockerfile.encode()), docker.TAR, view=view)
    assert seen.status == 200
    assert json.loads(seen.body.splitlines()[0])["stream"].startswith("STEP 1/4: FROM")
    assert containers.do("GET", f"/images/{pair[1]}/json", 200)["Config"]["Labels"].items() >= names.labels.items()


@instead_of(docker.TestBuild.test_a_build_that_fails_says_so_within_its_output, "progress")
@compares("ImageBuild")
def test_a_build_that_fails_says_so_within_its_output(both: Both, image: str, names: Names) -> None:
    body = docker.tar_of(Dockerfile=f"FROM {image}\nRUN exit 7\n".encode())
    target = f"/build?t={TWIN}&nocache=1&networkmode=none&forcerm=1"
    seen = both.twins("POST", target, twin_names(names, "build"), body, docker.TAR)
    assert b"exit status 7" in seen.body
    failed_within(seen)


@instead_of(docker.TestBuild.test_a_build_that_the_engine_refuses_relays_its_error, "temporary")
@compares("ImageBuild")
@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", docker.tar_of(something=b"else")),
        ("", docker.tar_of(Dockerfile=b"NONSENSE\n")),
        ("", docker.tar_of(Dockerfile=b"")),
        ("buildargs=nonsense", b""),
        ("t=UPPER", docker.tar_of(Dockerfile=b"FROM scratch\n")),
    ],
)
def test_a_build_that_the_engine_refuses_relays_its_error(both: Both, query: str, body: bytes) -> None:
    seen = both.same("POST", f"/build?{query}", body, docker.TAR, view=without_temporary_names)
    assert seen.status >= 400 or b"errorDetail" in seen.body
