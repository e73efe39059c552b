// Questions to the server this page comes from; a recorded page answers them itself.
import { answer, isRecording, NotRecorded, recording } from './recording.js';

// `kind`: gone (no answer), key (it needs one), busy (try again later), refused (the message says why), recorded (a
// recorded page does not have the answer).
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

export const setKey = (key) => sessionStorage.setItem('key', key);

async function request(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem('key');
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Failure('gone', error.message);
  }
  if (response.ok) return response;
  const message = (await response.json().catch(() => null))?.error?.message ?? `status ${response.status}`;
  const kinds = { 401: 'key', 429: 'busy', 503: 'gone' };
  throw new Failure(kinds[response.status] ?? 'refused', message);
}

export async function ask(path, body, signal) {
  return isRecording ? askRecording(path, body) : (await request(path, body, signal)).json();
}

export async function askBytes(path, body, signal) {
  return isRecording ? askRecording(path, body) : (await request(path, body, signal)).arrayBuffer();
}

async function askRecording(path, body) {
  try {
    return await answer(path, body);
  } catch (error) {
    if (error instanceof NotRecorded) throw new Failure('recorded', error.message);
    throw error;
  }
}

// Yield the pieces of a story as they are told.
export async function* tell(body, signal) {
  for await (const [, text] of tellMany(body, signal)) yield text;
}

// Yield [number of the story, piece] of several stories as they are told.
export async function* tellMany(body, signal) {
  for await (const data of watch('/v1/completions', signal, { ...body, stream: true })) {
    if (data === '[DONE]') return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(event.error.code === 'shutting_down' ? 'gone' : 'refused', event.error.message);
    for (const { index, text } of event.choices) if (text) yield [index, text];
  }
}

// Yield the data of the events of a stream. Its end or break is a Failure.
export async function* watch(path, signal, body = null) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = '';
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === 'AbortError') throw error;
        throw new Failure('gone', error.message);
      });
      if (done) throw new Failure('gone', 'the stream has ended');
      const lines = (waiting + value).split('\n');
      waiting = lines.pop();
      for (const line of lines) if (line.startsWith('data: ')) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Endings of a recorded text: only those that were recorded.
export const recordedEndings = async () => (await recording).endings;
