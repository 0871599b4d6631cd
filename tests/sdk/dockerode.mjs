// What programs do with dockerode, as its documentation shows it. Run by tests/test_bridge_sdk_dockerode.py, once with
// DOCKER_HOST at the engine and once at the bridge.
//
// A line of JSON comes in: {scenario, name, image, labels, ...}; `name` is what names shall begin with. One goes out:
// {result}, or {failure} with the stack of what the scenario threw.
import { createHash } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { createInterface } from 'node:readline';
import { PassThrough, Readable } from 'node:stream';
import Docker from 'dockerode';
import tar from 'tar-stream';

const docker = new Docker(); // takes DOCKER_HOST from the environment

/** Options of a container: our labels, no network, killed at once when stopped. */
function options({ labels, image }, name, more = {}) {
  return { Image: image, name, Labels: labels, StopSignal: 'SIGKILL', HostConfig: { NetworkMode: 'none' }, ...more };
}

async function started(asked, name, command = ['sleep', '1d'], more = {}) {
  const container = await docker.createContainer(options(asked, name, { Cmd: command, ...more }));
  await container.start();
  return container;
}

/** A stream being read from now on: `until(text)` and `toItsEnd()` give what came since they last did. */
function reading(stream) {
  const changes = new EventEmitter();
  let [seen, ended] = ['', false];
  stream.on('data', (chunk) => {
    seen += chunk.toString('latin1');
    changes.emit('change');
  });
  for (const event of ['end', 'close', 'error']) {
    stream.on(event, () => {
      ended = true;
      changes.emit('change');
    });
  }
  const take = () => {
    const taken = seen;
    seen = '';
    return taken;
  };
  return {
    async until(text) {
      while (!seen.includes(text)) {
        if (ended) throw new Error(`the stream ended after ${JSON.stringify(seen)}, without ${text}`);
        await once(changes, 'change');
      }
      return take();
    },
    async toItsEnd() {
      while (!ended) await once(changes, 'change');
      return take();
    },
  };
}

/** All that a stream gives, to its end. */
async function all(stream) {
  return Buffer.from(await reading(stream).toItsEnd(), 'latin1');
}

/** What a multiplexed stream gives, to its end: [stdout, stderr]. */
async function demuxed(stream) {
  const [out, err] = [new PassThrough(), new PassThrough()];
  docker.modem.demuxStream(stream, out, err);
  const outputs = Promise.all([all(out), all(err)]);
  await reading(stream).toItsEnd();
  out.end();
  err.end();
  return (await outputs).map(String);
}

/** The frames of a multiplexed stream's text: [[kind, payload], ...]. */
function frames(text) {
  const bytes = Buffer.from(text, 'latin1');
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const length = bytes.readUInt32BE(at + 4);
    found.push([bytes[at], bytes.toString('latin1', at + 8, at + 8 + length)]);
    at += 8 + length;
  }
  return found;
}

/** The lines of a progress stream, by dockerode's own reader. */
function progress(stream) {
  return new Promise((resolve, reject) => {
    const live = [];
    docker.modem.followProgress(
      stream,
      (error, output) => (error ? reject(error) : resolve({ output, live: live.length })),
      (event) => live.push(event),
    );
  });
}

/** A tar stream of small files: {name: content}. */
function archive(files) {
  const pack = tar.pack();
  for (const [name, content] of Object.entries(files)) pack.entry({ name }, content);
  pack.finalize();
  return pack;
}

async function unpacked(stream) {
  const files = {};
  const extract = tar.extract();
  extract.on('entry', (header, content, next) => {
    all(content).then((bytes) => {
      files[header.name] = `${bytes.length} ${createHash('md5').update(bytes).digest('hex')}`;
      next();
    });
  });
  stream.pipe(extract);
  await once(extract, 'finish');
  return files;
}

/** The error of a call: status, reason, message. */
async function told(call) {
  try {
    await call;
  } catch (error) {
    return [error.statusCode, error.reason ?? null, error.message];
  }
  throw new Error('no error');
}

const scenarios = {
  async run(asked) {
    const [out, err] = [new PassThrough(), new PassThrough()];
    const outputs = Promise.all([all(out), all(err)]);
    const script = 'echo out; echo err >&2; exit 3';
    const made = options(asked, `${asked.name}1`, { Tty: false });
    const [ended, container] = await docker.run(asked.image, ['sh', '-c', script], [out, err], made);
    out.end();
    err.end();
    await container.remove();
    return [ended.StatusCode, (await outputs).map(String)];
  },

  async runOnATerminal(asked) {
    const out = new PassThrough();
    const output = all(out);
    const [ended] = await docker.run(asked.image, ['seq', '3'], out, options(asked, `${asked.name}1`));
    out.end();
    return [ended.StatusCode, String(await output)];
  },

  async exec(asked) {
    const container = await started(asked, `${asked.name}1`);
    const seen = [];
    for (const hijack of [true, false]) {
      const exec = await container.exec({
        Cmd: ['sh', '-c', 'echo out; echo err >&2; exit 4'],
        AttachStdout: true,
        AttachStderr: true,
      });
      const stream = await exec.start({ hijack, stdin: false });
      seen.push([await demuxed(stream), (await exec.inspect()).ExitCode]);
    }
    return seen;
  },

  async execWithStdin(asked) {
    const container = await started(asked, `${asked.name}1`);
    const exec = await container.exec({
      Cmd: ['sh', '-c', 'wc -c; echo end >&2'],
      AttachStdin: true,
      AttachStdout: true,
      AttachStderr: true,
    });
    const stream = await exec.start({ hijack: true, stdin: true });
    const output = demuxed(stream);
    Readable.from([Buffer.alloc(100_000, 'x'), Buffer.alloc(100_000, 'y')]).pipe(stream); // ends stdin, too
    return [await output, (await exec.inspect()).ExitCode];
  },

  async execWithStdinWithoutUpgrade(asked) {
    const container = await started(asked, `${asked.name}1`);
    const exec = await container.exec({
      Cmd: ['sh', '-c', 'read x; echo "got $x"; read y; echo "and $y"'],
      AttachStdin: true,
      AttachStdout: true,
      AttachStderr: true,
    });
    const stream = await exec.start({ stdin: true });
    const output = reading(stream);
    stream.write('one\n');
    const first = await output.until('got one\n');
    stream.write('two\n');
    const rest = await output.toItsEnd();
    return [frames(first), frames(rest), (await exec.inspect()).ExitCode];
  },

  async execOnATerminal(asked) {
    const container = await started(asked, `${asked.name}1`);
    const exec = await container.exec({
      Cmd: ['sh', '-c', 'read x; stty size'],
      AttachStdin: true,
      AttachStdout: true,
      Tty: true,
    });
    const stream = await exec.start({ hijack: true, stdin: true, Tty: true });
    await exec.resize({ h: 33, w: 77 });
    stream.write('\n');
    return String(await all(stream));
  },

  async attach(asked) {
    const seen = [];
    for (const hijack of [true, false]) {
      const script = 'echo out; sleep .1; echo err >&2';
      const container = await docker.createContainer(
        options(asked, `${asked.name}${hijack}`, { Cmd: ['sh', '-c', script] }),
      );
      const stream = await container.attach({ stream: true, stdout: true, stderr: true, hijack });
      const output = demuxed(stream);
      await container.start();
      seen.push(await output);
    }
    return seen;
  },

  async attachWithStdin(asked) {
    const container = await docker.createContainer(
      options(asked, `${asked.name}1`, { Cmd: ['sh', '-c', 'cat; sleep .1; echo end'], OpenStdin: true, StdinOnce: true }),
    );
    const stream = await container.attach({ stream: true, stdin: true, stdout: true, stderr: true, hijack: true });
    const output = demuxed(stream);
    await container.start();
    stream.end('one\ntwo\n');
    return [await output, (await container.wait()).StatusCode];
  },

  async attachWithStdinWithoutUpgrade(asked) {
    // The engine reads what follows the head as it stands; this goes on for as long as the caller likes.
    const container = await docker.createContainer(
      options(asked, `${asked.name}1`, {
        Cmd: ['sh', '-c', 'read x; echo "got $x"; read y; echo "and $y"; exit 6'],
        OpenStdin: true,
      }),
    );
    const stream = await container.attach({ stream: true, stdin: true, stdout: true, stderr: true });
    await container.start();
    const output = reading(stream);
    stream.write('one\n');
    const first = await output.until('got one\n');
    stream.write('two\n');
    const rest = await output.toItsEnd();
    return [frames(first), frames(rest), (await container.wait()).StatusCode];
  },

  async attachToATerminal(asked) {
    const container = await docker.createContainer(
      options(asked, `${asked.name}1`, { Cmd: ['cat'], OpenStdin: true, Tty: true }),
    );
    const stream = await container.attach({ stream: true, stdin: true, stdout: true, hijack: true });
    await container.start();
    await container.resize({ h: 20, w: 60 });
    stream.write('hello\n\x04');
    return String(await all(stream));
  },

  async logs(asked) {
    const script = 'echo one; until [ -e /go ]; do sleep .02; done; echo two; sleep 1d';
    const container = await started(asked, `${asked.name}1`, ['sh', '-c', script]);
    const log = await container.logs({ follow: true, stdout: true, stderr: true });
    const output = reading(log);
    const first = await output.until('one\n');
    const exec = await container.exec({ Cmd: ['touch', '/go'], AttachStdout: true });
    await all(await exec.start());
    const second = await output.until('two\n');
    log.destroy();
    const whole = await container.logs({ follow: false, stdout: true, stderr: true, tail: 1 });
    return [frames(first), frames(second), frames(whole.toString('latin1'))];
  },

  async events(asked) {
    const name = `${asked.name}1`;
    const stream = await docker.getEvents({ since: 0, filters: { container: [name] } });
    const container = await started(asked, name, ['true']);
    await container.wait();
    await container.remove();
    const text = await reading(stream).until('"destroy"');
    stream.destroy();
    return text.trim().split('\n').map((line) => JSON.parse(line).Action);
  },

  async stats(asked) {
    const container = await started(asked, `${asked.name}1`);
    const one = container.stats({ stream: false });
    const stream = await container.stats({ stream: true });
    const first = JSON.parse(await reading(stream).until('\n'));
    stream.destroy();
    return [first, await one].map((stats) => Object.keys(stats).sort());
  },

  async build(asked) {
    const name = `${asked.name}1`;
    const files = { Dockerfile: `FROM ${asked.image}\nRUN echo hello > /said\nCOPY file /\n`, file: 'from the tar\n' };
    const stream = await docker.buildImage(archive(files), {
      t: name,
      labels: JSON.stringify(asked.labels),
      networkmode: 'none',
      nocache: true,
    });
    const { output, live } = await progress(stream);
    const out = new PassThrough();
    const printed = all(out);
    await docker.run(name, ['cat', '/said', '/file'], out, options(asked, `${asked.name}2`, { Image: name }));
    out.end();
    return [output, live === output.length, String(await printed)];
  },

  async pushAndPull(asked) {
    const repo = `${asked.registry}/${asked.name}`;
    await docker.getImage(asked.image).tag({ repo, tag: 'v1' });
    const authconfig = { username: 'nobody', password: 'x'.repeat(4000) };
    const pushed = await progress(await docker.getImage(`${repo}:v1`).push({ authconfig }));
    await docker.getImage(`${repo}:v1`).remove();
    const pulled = await progress(await docker.pull(`${repo}:v1`, { authconfig }));
    const inspected = await docker.getImage(`${repo}:v1`).inspect();
    await docker.getImage(`${repo}:v1`).remove();
    return [pushed.output[0], pushed.output.at(-1), pulled.output.at(-1), inspected.RepoTags.includes(`${repo}:v1`)];
  },

  async saveAndLoad(asked) {
    const name = `${asked.name}1`;
    await progress(await docker.buildImage(archive({ Dockerfile: `FROM ${asked.image}\nLABEL a=b\n` }), { t: name }));
    const saved = await all(await docker.getImage(name).get());
    await docker.getImage(name).remove();
    const { output } = await progress(await docker.loadImage(Readable.from([saved])));
    const inspected = await docker.getImage(name).inspect();
    const history = await docker.getImage(name).history();
    return [output.at(-1), inspected.Config.Labels.a, history.length];
  },

  async files(asked) {
    const container = await docker.createContainer(options(asked, `${asked.name}1`, { Cmd: ['true'] }));
    await container.putArchive(archive({ small: 'hello', large: Buffer.alloc(3_000_000, 'xyz') }), { path: '/tmp' });
    const info = await all(await container.infoArchive({ path: '/tmp/small' }));
    const found = await unpacked(await container.getArchive({ path: '/tmp' }));
    const changed = await container.changes();
    return [info.length, found, changed.map(({ Path }) => Path).sort()];
  },

  async life(asked) {
    const container = await started(asked, `${asked.name}1`);
    const states = { pause: 'paused', unpause: 'running', restart: 'running', stop: 'exited', start: 'running', kill: 'exited' };
    for (const [step, state] of Object.entries(states)) {
      await container[step]({ t: 0 });
      while ((await container.inspect()).State.Status !== state); // the engine says so a little later than it does it
    }
    const again = await told(container.kill());
    await container.rename({ name: `${asked.name}2` });
    const listed = await docker.listContainers({ all: true, filters: { name: [`${asked.name}2`] } });
    const top = await told(container.top());
    await container.remove({ v: true });
    return [again, listed.length, top];
  },

  async waitBeforeStart(asked) {
    const container = await docker.createContainer(options(asked, `${asked.name}1`, { Cmd: ['sh', '-c', 'exit 7'] }));
    const ended = container.wait({ condition: 'next-exit' });
    await container.start();
    return (await ended).StatusCode;
  },

  async volumesAndNetworks(asked) {
    const label = `${asked.name}l`;
    const Labels = { ...asked.labels, [label]: '1' };
    const volume = await docker.createVolume({ Name: `${asked.name}1`, Labels });
    const volumes = await docker.listVolumes({ filters: { label: [label] } });
    const inspected = await docker.getVolume(volume.Name ?? volume.name).inspect();
    await docker.getVolume(inspected.Name).remove();
    const network = await docker.createNetwork({ Name: `${asked.name}2`, Internal: true, Labels });
    const container = await docker.createContainer(options(asked, `${asked.name}3`, { HostConfig: {} }));
    await network.connect({ Container: container.id });
    await network.disconnect({ Container: container.id });
    const networks = await docker.listNetworks({ filters: { label: [label] } });
    await network.remove();
    await docker.createNetwork({ Name: `${asked.name}4`, Internal: true, Labels });
    const left = docker.getNetwork(`${asked.name}4`);
    const kept = (await left.inspect()).Labels[label];
    await left.remove();
    return [volumes.Volumes.length, inspected.Driver, networks.length, kept];
  },

  async system() {
    const [version, info, ping] = [await docker.version(), await docker.info(), await docker.ping()];
    return [version, info.ID, Object.keys(info).sort(), String(ping)];
  },

  async errors(asked) {
    const missing = `${asked.name}-missing`;
    const container = await docker.createContainer(options(asked, `${asked.name}1`));
    return [
      await told(docker.getContainer(missing).inspect()),
      await told(docker.getContainer(missing).attach({ stream: true, stdout: true, hijack: true })),
      await told(docker.getContainer(missing).attach({ stream: true, stdout: true })),
      await told(docker.getContainer(missing).logs({ stdout: true, follow: true })),
      await told(docker.getImage(missing).inspect()),
      await told(docker.getVolume(missing).inspect()),
      await told(docker.getNetwork(missing).inspect()),
      await told(docker.getExec(missing).start({ hijack: true })),
      await told(docker.getExec(missing).start({})),
      await told(docker.createContainer(options(asked, `${asked.name}1`))),
      await told(container.exec({ Cmd: ['true'] })),
      await told(container.getArchive({ path: '/no/such' })),
      await told(docker.buildImage(archive({ Dockerfile: 'FROM' }), {})),
    ];
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  let answer;
  try {
    answer = { result: await scenarios[asked.scenario](asked) };
  } catch (error) {
    answer = { failure: String(error.stack) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit(0);
