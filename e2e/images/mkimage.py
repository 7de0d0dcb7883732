#!/usr/bin/env python3
"""Write an OCI image archive that `ctr -n k8s.io images import` takes: no daemon, no registry, no network.

  mkimage.py --name localhost/app:1 --out app.tar [what goes in] [how it runs]

what goes in   --bin SRC[=DST]      an executable and every shared library it needs (ldd)
               --file SRC=DST       one file (a link is followed)     --dir DST   an empty folder
               --layer-dir FOLDER   a folder tree as one layer        --layer-tar TAR   a root tar (mmdebstrap) as one layer
               --ca                 the machine's CA bundle           --users     passwd/group with root, nonroot (65532), nobody
               --base ARCHIVE       start from another archive made here (its layers and settings come first)
how it runs    --entrypoint JSON --cmd JSON --env K=V --user U[:G] --workdir D --label K=V --stop-signal NAME

  mkimage.py --pause --out pause.tar      the sandbox image, compiled here with gcc -static

Layers are stored uncompressed, so a layer's digest equals its diff id, and times and owners are fixed, so the same
input gives the same digest. Name images localhost/NAME:TAG: a name without a host part is taken to live on a public registry.
"""
import argparse, hashlib, io, json, os, re, shutil, subprocess, sys, tarfile, tempfile

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
PAUSE_C = r"""
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void down(int s) { (void)s; _exit(0); }
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0) {} }
int main(void) {
  struct sigaction d = {0}, r = {0};
  d.sa_handler = down; r.sa_handler = reap; r.sa_flags = SA_NOCLDSTOP;
  sigaction(SIGINT, &d, 0); sigaction(SIGTERM, &d, 0); sigaction(SIGCHLD, &r, 0);
  for (;;) pause();
}
"""


def norm(ti):
    ti.uid = ti.gid = 0
    ti.uname = ti.gname = ""
    ti.mtime = EPOCH
    return ti


def sha_file(path):
    h, n = hashlib.sha256(), 0
    with open(path, "rb") as f:
        while b := f.read(1 << 20):
            h.update(b)
            n += len(b)
    return h.hexdigest(), n


def libs(binary):
    """Paths of the loader and libraries of a dynamic executable; empty for a static one."""
    p = subprocess.run(["ldd", binary], capture_output=True, text=True)
    if "not found" in p.stdout:
        sys.exit(f"{binary}: a library is missing:\n{p.stdout}")
    return re.findall(r"(?:=> |^\s*)(/\S+) \(0x", p.stdout, re.M)


def tar_tree(folder, out):
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as t:
        for root, dirs, files in os.walk(folder):
            dirs.sort()
            rel = os.path.relpath(root, folder)
            if rel != ".":
                t.add(root, rel, recursive=False, filter=norm)
            links = [d for d in dirs if os.path.islink(os.path.join(root, d))]
            dirs[:] = [d for d in dirs if d not in links]
            for f in sorted(files + links):
                t.add(os.path.join(root, f), os.path.normpath(os.path.join(rel, f)), recursive=False, filter=norm)


def tar_files(pairs, dirs, texts, out):
    made = set()
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as t:
        def folder(p):
            if p in ("", ".") or p in made:
                return
            folder(os.path.dirname(p))
            made.add(p)
            ti = tarfile.TarInfo(p)
            ti.type, ti.mode = tarfile.DIRTYPE, 0o1777 if p == "tmp" else 0o755
            t.addfile(norm(ti))
        for d in dirs:
            folder(d.strip("/"))
        for dst, text in texts:
            folder(os.path.dirname(dst))
            ti = tarfile.TarInfo(dst)
            ti.size, ti.mode = len(text), 0o644
            t.addfile(norm(ti), io.BytesIO(text.encode()))
        for src, dst in sorted(pairs.items(), key=lambda x: x[1]):
            dst = dst.lstrip("/")
            folder(os.path.dirname(dst))
            ti = norm(t.gettarinfo(os.path.realpath(src), dst))
            ti.mode |= 0o444 | (0o111 if ti.mode & 0o100 else 0)
            with open(src, "rb") as f:
                t.addfile(ti, f)


def main():
    a = argparse.ArgumentParser(usage=__doc__)
    for x in ("name", "out", "base", "entrypoint", "cmd", "user", "workdir", "stop-signal"):
        a.add_argument("--" + x)
    for x in ("bin", "file", "dir", "layer-tar", "layer-dir", "env", "label"):
        a.add_argument("--" + x, action="append", default=[])
    for x in ("ca", "users", "pause"):
        a.add_argument("--" + x, action="store_true")
    o = a.parse_args()
    tmp = tempfile.mkdtemp(dir=os.path.dirname(os.path.abspath(o.out)))
    try:
        build(o, tmp)
    finally:
        shutil.rmtree(tmp)


def build(o, tmp):
    pairs, texts = {}, []
    if o.pause:
        o.name, o.entrypoint, o.user = o.name or "localhost/pause:1", '["/pause"]', "65535:65535"
        subprocess.run(["gcc", "-Os", "-static", "-s", "-x", "c", "-o", f"{tmp}/pause", "-"], input=PAUSE_C, text=True, check=True)
        pairs[f"{tmp}/pause"] = "/pause"
    if not o.name or ":" not in o.name.rsplit("/", 1)[-1]:
        sys.exit("--name needs a tag, such as localhost/app:1")
    for b in o.bin:
        src, _, dst = b.partition("=")
        pairs[src] = dst or "/" + os.path.basename(src)
        for lib in libs(src):
            pairs[lib] = lib
    for f in o.file:
        src, dst = f.split("=", 1)
        pairs[src] = dst
    if o.ca:
        pairs["/etc/ssl/certs/ca-certificates.crt"] = "/etc/ssl/certs/ca-certificates.crt"
    if o.users:
        texts += [("etc/passwd", "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"),
                  ("etc/group", "root:x:0:\nnonroot:x:65532:\nnogroup:x:65534:\n")]
        o.dir.append("tmp")
    layers, cfg = [], {"architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z", "config": {}}
    if o.base:
        with tarfile.open(o.base) as t:
            t.extractall(f"{tmp}/base")
        one = lambda d: f"{tmp}/base/blobs/sha256/" + d.split(":")[1]
        man = json.load(open(one(json.load(open(f"{tmp}/base/index.json"))["manifests"][0]["digest"])))
        cfg["config"] = json.load(open(one(man["config"]["digest"])))["config"]
        layers += [one(x["digest"]) for x in man["layers"]]
    layers += o.layer_tar
    for i, d in enumerate(o.layer_dir):
        tar_tree(d, f"{tmp}/tree{i}.tar")
        layers.append(f"{tmp}/tree{i}.tar")
    if pairs or texts or o.dir:
        tar_files(pairs, o.dir, texts, f"{tmp}/files.tar")
        layers.append(f"{tmp}/files.tar")
    if not layers:
        sys.exit("nothing to put in the image")
    blobs = [(*sha_file(p), p) for p in layers]
    c = cfg["config"]
    env = dict(e.split("=", 1) for e in c.get("Env", ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]) + o.env)
    c["Env"] = [f"{k}={v}" for k, v in env.items()]
    for key, val in (("Entrypoint", o.entrypoint), ("Cmd", o.cmd)):
        if val:
            c[key] = json.loads(val)
    for key, val in (("User", o.user), ("WorkingDir", o.workdir), ("StopSignal", o.stop_signal)):
        if val:
            c[key] = val
    if o.label:
        c["Labels"] = dict(x.split("=", 1) for x in o.label)
    cfg["rootfs"] = {"type": "layers", "diff_ids": ["sha256:" + h for h, _, _ in blobs]}

    def blob(obj):
        b = json.dumps(obj, sort_keys=True).encode()
        return hashlib.sha256(b).hexdigest(), b
    v1 = "application/vnd.oci.image."
    ch, cb = blob(cfg)
    mh, mb = blob({"schemaVersion": 2, "mediaType": v1 + "manifest.v1+json",
                   "config": {"mediaType": v1 + "config.v1+json", "digest": "sha256:" + ch, "size": len(cb)},
                   "layers": [{"mediaType": v1 + "layer.v1.tar", "digest": "sha256:" + h, "size": n} for h, n, _ in blobs]})
    _, ib = blob({"schemaVersion": 2, "mediaType": v1 + "index.v1+json", "manifests": [
        {"mediaType": v1 + "manifest.v1+json", "digest": "sha256:" + mh, "size": len(mb), "platform": {"architecture": "amd64", "os": "linux"},
         "annotations": {"io.containerd.image.name": o.name, "org.opencontainers.image.ref.name": o.name.rsplit(":", 1)[-1]}}]})
    with tarfile.open(o.out, "w") as t:
        for name, data in (("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", ib), ("blobs/sha256/" + ch, cb), ("blobs/sha256/" + mh, mb)):
            ti = tarfile.TarInfo(name)
            ti.size, ti.mode = len(data), 0o644
            t.addfile(norm(ti), io.BytesIO(data))
        for h, p in {h: p for h, _, p in blobs}.items():
            t.add(os.path.realpath(p), "blobs/sha256/" + h, recursive=False, filter=norm)
    print(f"{o.name} sha256:{mh} {os.path.getsize(o.out)} bytes, {len(blobs)} layer(s)")


main()
