// The state of a page in the fragment of its URL: it can be shared, and never reaches a server.

const LONG = 300; // characters from which a text is compressed

export async function readFragment() {
  const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const name of Object.keys(state)) {
    if (state[name].startsWith('z.')) state[name] = await unpack(state[name].slice(2)).catch(() => '');
  }
  return state;
}

// Text values must not begin with "z."; `packText` makes sure of it.
export async function makeFragment(state) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== undefined && value !== null && value !== '') params.set(name, await packText(String(value)));
  }
  return `#${params}`;
}

async function packText(text) {
  if (text.length <= LONG && !text.startsWith('z.')) return text;
  const stream = new Blob([text]).stream().pipeThrough(new CompressionStream('deflate-raw'));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join('');
  return `z.${btoa(binary).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')}`;
}

async function unpack(packed) {
  const binary = atob(packed.replaceAll('-', '+').replaceAll('_', '/'));
  const bytes = Uint8Array.from(binary, (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'))).text();
}
