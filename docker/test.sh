#!/usr/bin/env bash
# Builds both images and runs them (`make docker-test`): with Docker where its engine answers, else with buildah and
# podman. PIP_CERT and PIP_FIND_LINKS are handed to the build where they are set. Leaves no image or container behind.
set -euo pipefail
cd "$(dirname "$0")/.."

base=python:3.11-slim-bookworm
demo=sparring:test
jupyter=sparring-jupyter:test
name=sparring-test-$$
project=sparringtest$$
work=$(mktemp -d)
made_base=
compose=()

say() { echo "docker-test: $*"; }
fail() {
    say "FAILED: $*" >&2
    exit 1
}

# Runs a command quietly; shows the end of what it said if it fails.
quietly() {
    "$@" >"$work/log" 2>&1 || {
        tail -n 40 "$work/log" >&2
        fail "$*"
    }
}

# --- The engine -------------------------------------------------------------------------------------------------------

use_docker() {
    engine=docker
    export DOCKER_BUILDKIT=1
    build=(docker build)
    if docker compose version >/dev/null 2>&1; then compose=(docker compose); fi
}

use_podman() {
    local missing=() command
    for command in buildah podman runc podman-compose; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    if ((${#missing[@]})); then
        if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
            fail "needs Docker, or Debian's buildah, podman, runc and podman-compose; missing: ${missing[*]}"
        fi
        say "installing ${missing[*]}"
        quietly apt-get update
        quietly apt-get install --yes --no-install-recommends "${missing[@]}"
    fi
    engine=podman
    build=(buildah build --isolation chroot --layers --pull-never)
    compose=(podman-compose)
    # A store of its own, and limits low enough to be set by one who may not raise any.
    cat >"$work/storage.conf" <<EOF
[storage]
driver = "overlay"
graphroot = "$work/store"
rootless_storage_path = "$work/store"
runroot = "$work/run"
EOF
    cat >"$work/containers.conf" <<EOF
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
EOF
    export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
}

# The base image: the one that is there, the registry's, or a Debian with its own Python under the same name.
get_base() {
    if "$engine" image inspect "$base" >/dev/null 2>&1; then return; fi
    if timeout 300 "$engine" pull --quiet "docker.io/library/$base" >/dev/null 2>&1; then return; fi
    say "no registry answers: a bare Debian with its own Python stands in for $base"
    [[ $(id -u) == 0 ]] || fail "that takes root, for debootstrap"
    command -v debootstrap >/dev/null || {
        quietly apt-get update
        quietly apt-get install --yes --no-install-recommends debootstrap
    }
    quietly debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/debian"
    tar -C "$work/debian" --one-file-system -c . | "$engine" import - "docker.io/library/$base" >/dev/null 2>&1
    rm -rf "$work/debian"
    made_base=1
}

clean_up() {
    if ((${#compose[@]})); then compose down --volumes >/dev/null 2>&1 || true; fi
    "${engine:-true}" rm --force "$name" >/dev/null 2>&1 || true
    "${engine:-true}" network rm "${project}_default" >/dev/null 2>&1 || true # podman-compose leaves it
    if [[ ${engine-} == docker ]]; then
        # What the container's users wrote is theirs; back to us, so that it can be removed.
        docker run --rm --network none --user 0 --volume "$work:/mine" --entrypoint chown \
            "$demo" -R "$(id -u):$(id -g)" /mine >/dev/null 2>&1 || true
        docker image rm "$demo" "$jupyter" ${made_base:+"$base"} >/dev/null 2>&1 || true
    elif [[ $(id -u) == 0 ]]; then
        # The last mounted first: what a failed build left, then the store's own.
        awk -v at="$work/" 'index($2, at) == 1 { print $2 }' /proc/mounts | tac | xargs --no-run-if-empty umount || true
    fi
    rm -rf "$work" 2>/dev/null || buildah unshare rm -rf "$work" || say "left behind: $work"
}

# --- Build ------------------------------------------------------------------------------------------------------------

# What pip needs from this machine goes in as a build context, which is in no image.
pip_args() {
    args=()
    mkdir "$work/pip"
    if [[ -n ${PIP_CERT-} ]]; then
        cp "$PIP_CERT" "$work/pip/cert.pem"
        args+=(--build-arg PIP_CERT=/pip/cert.pem)
    fi
    if [[ -d ${PIP_FIND_LINKS-} ]]; then
        cp -rL "$PIP_FIND_LINKS" "$work/pip/wheels"
        args+=(--build-arg PIP_FIND_LINKS=/pip/wheels)
        if compgen -G "$work/pip/wheels/torch-*" >/dev/null; then args+=(--build-arg TORCH_INDEX=); fi
    elif [[ -n ${PIP_FIND_LINKS-} ]]; then
        args+=(--build-arg "PIP_FIND_LINKS=$PIP_FIND_LINKS")
    fi
    if ((${#args[@]})); then args+=(--build-context "pip=$work/pip"); fi
}

build_image() {
    local target=$1 tag=$2 start=$SECONDS
    say "building $tag"
    quietly "${build[@]}" --file docker/Dockerfile --target "$target" --tag "$tag" ${args[@]+"${args[@]}"} .
    say "built $tag in $((SECONDS - start)) s, $(($("$engine" image inspect --format '{{.Size}}' "$tag") / 1000000)) MB"
}

# --- Run --------------------------------------------------------------------------------------------------------------

run() { "$engine" run --rm --network none --env SPARRING_OFFLINE=1 "$@"; }

# A folder that anyone may write to, whoever the container's user is on this machine.
open_folder() {
    mkdir "$work/$1"
    chmod "${2-777}" "$work/$1"
    echo "$work/$1"
}

test_demo() {
    local runs report version start=$SECONDS
    [[ $(run --entrypoint id "$demo" -u) == 1000 ]] || fail "the demo's user is not 1000"
    say "the demo runs as user 1000"

    runs=$(open_folder runs)
    quietly run --volume "$runs:/runs" "$demo"
    report=$(compgen -G "$runs/*-demo/report.html") || fail "no report in $runs"
    if (($(stat -c %s "$report") < 100000)) || ! grep -q '</html>' "$report"; then fail "$report is no report"; fi
    say "the default command wrote ${report#"$work/"}, $(stat -c %s "$report") bytes, offline, $((SECONDS - start)) s"

    version=$(run "$demo" --version)
    say "with arguments: $version"

    runs=$(open_folder other)
    quietly run --user 12345:12345 --volume "$runs:/runs" "$demo" train --data digits --net dense --steps 20
    compgen -G "$runs/*-train/*.safetensors" >/dev/null || fail "another user's training left nothing in $runs"
    say "--user: another user's training is in its folder"

    runs=$(open_folder locked 555)
    if run --volume "$runs:/runs" "$demo" >"$work/log" 2>&1; then fail "a folder that cannot be written passed"; fi
    grep -q 'cannot write to /runs' "$work/log" || fail "no word on the folder that cannot be written"
    say "a folder that cannot be written: $(head -n 1 "$work/log")"
}

# Waits for the JupyterLab at port $1: it wants the token, and with it shows its page and the chapters.
test_server() {
    local at=http://127.0.0.1:$1 start=$SECONDS chapters
    until curl -fsS -o "$work/status" "$at/api/status?token=$token" 2>/dev/null; do
        ((SECONDS - start < 120)) || fail "no JupyterLab answers at $at"
        sleep 1
    done
    [[ $(curl -sS -o /dev/null -w '%{http_code}' "$at/api/contents") == 403 ]] || fail "it answers without a token"
    curl -fsSL -c "$work/cookies" -o "$work/page" "$at/lab?token=$token"
    grep -q JupyterLab "$work/page" || fail "no JupyterLab at $at/lab"
    curl -fsS -o "$work/list" "$at/api/contents?token=$token"
    chapters=$(grep -o '"type": *"notebook"' "$work/list" | wc -l) || fail "no notebook in JupyterLab's folder"
    say "JupyterLab answered at port $1 after $((SECONDS - start)) s, wants its token, shows $chapters notebook files"
}

test_jupyter() {
    local versions
    "$engine" run --detach --name "$name" --publish 127.0.0.1::8888 --env JUPYTER_TOKEN="$token" "$jupyter" >/dev/null
    [[ $("$engine" exec "$name" id -u) == 1000 ]] || fail "the user of the jupyter image is not 1000"
    test_server "$("$engine" port "$name" 8888/tcp | sed -n '1s/.*://p')"
    versions=$("$engine" exec --env TF_CPP_MIN_LOG_LEVEL=3 "$name" python -c '
import keras, sparring, tensorflow, torch
print(*(f"{module.__name__} {module.__version__}" for module in (tensorflow, keras, torch, sparring)), sep=", ")
' 2>"$work/log") || { cat "$work/log" >&2; fail "an import failed in the jupyter image"; }
    say "it imports $versions"
    "$engine" stop "$name" >/dev/null
    "$engine" rm "$name" >/dev/null
}

compose() {
    SPARRING_TAG=test SPARRING_RUNS=$work/composed SPARRING_PORT=$port JUPYTER_TOKEN=$token \
        "${compose[@]}" --file docker/compose.yaml --project-name "$project" "$@"
}

test_compose() {
    if ! ((${#compose[@]})); then
        say "no compose here: compose.yaml not tried"
        return
    fi
    open_folder composed >/dev/null
    quietly compose run --rm demo train --data digits --net dense --steps 20
    compgen -G "$work/composed/*-train/*.safetensors" >/dev/null || fail "the composed training left nothing"
    quietly compose up --detach jupyter
    test_server "$port"
    quietly compose down --volumes
    say "compose.yaml: both services ran"
}

# ----------------------------------------------------------------------------------------------------------------------

trap clean_up EXIT
command -v curl >/dev/null || fail "needs curl"
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
port=$((20000 + RANDOM % 10000))
if docker info >/dev/null 2>&1; then use_docker; else use_podman; fi
say "with $("$engine" --version)"
get_base
python=$(run --entrypoint python3 "$base" --version)
say "base image: $base with $python"
pip_args
build_image demo "$demo"
build_image jupyter "$jupyter"
test_demo
test_jupyter
test_compose
say "passed in $SECONDS s"
