// One recording as the server hears it, over as many connections as it takes.
//
// States: connecting -> live -> finishing -> ended, with reconnecting and waiting (for the next attempt) in between,
// and failed. After a lost connection the session is resumed with the token that the server gave for it; where nobody
// has it any more, as after a crash, a new one hears again what has no final text.
// Times in events are seconds since the recording began, whatever connection they came over.

import { Backlog, backoff } from "./backlog.js";
import { RATE } from "./capture.js";

const REPLAY_SECONDS = 30; // longer than an utterance, so that what has no final yet can be heard again
const AGAIN_MS = 200; // from the loss of a connection to the first attempt at another
const WAITING_SECONDS = 60 + REPLAY_SECONDS;
const SOCKET_BYTES = 256 * 1024; // eight seconds of audio on their way are enough
const PUMP_MS = 100;

export class Session {
  #url;
  #protocols;
  #options;
  #listener;
  #backlog = new Backlog(WAITING_SECONDS * RATE, REPLAY_SECONDS * RATE);
  #socket = null;
  #ready = false;
  #stopping = false; // no more audio will come
  #endSent = false;
  #refusal = null; // the error message that the server closed with
  #attempt = 0;
  #offset = 0; // sample of the recording at which the server's session began
  #token = null; // stands for that session
  #seq = 0; // number of the last event that came
  #resuming = false; // this connection is to go on with it
  #timer = 0;
  #pump = 0;

  /**
   * @param {string} url of the WebSocket
   * @param {{chunk_ms: number, decoder?: string}} options for the server
   * @param {object} listener with state(name, detail), ready(message, resumed), partial(message), final(message)
   * @param {?string} key where the server asks for one
   */
  constructor(url, options, listener, key = null) {
    this.#url = url;
    // The only place of a request in which a browser lets a page put a key, but for the address.
    this.#protocols = key === null ? ["loquent.v1"] : ["loquent.v1", "token", key];
    this.#options = options;
    this.#listener = listener;
    this.#connect();
  }

  /** Whether no more audio comes. */
  get stopping() {
    return this.#stopping;
  }

  /** Seconds recorded so far. */
  get recorded() {
    return this.#backlog.end / RATE;
  }

  /** @param {Int16Array} pcm */
  send(pcm) {
    if (this.#stopping) return;
    if (this.#backlog.push(pcm)) {
      this.#drain();
    } else {
      this.#fail("The server took no audio for more than a minute, so captioning stopped. The text so far is kept.");
    }
  }

  /** No more audio comes: have the rest recognised, then end. */
  finish() {
    this.#stopping = true;
    if (this.#socket !== null && this.#ready) this.#listener.state("finishing");
    this.#drain();
  }

  /** Ends at once, whatever the server still owes, and so that it keeps nothing for us. */
  abort() {
    this.#close();
    this.#listener.state("ended");
  }

  #connect() {
    this.#resuming = this.#token !== null;
    this.#listener.state(this.#resuming ? "reconnecting" : "connecting", { attempt: this.#attempt });
    this.#refusal = null;
    const url = new URL(this.#url);
    if (this.#resuming) url.searchParams.set("resume", "1"); // and is no second session
    const socket = new WebSocket(url, this.#protocols);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onopen = () => {
      const hello = this.#resuming
        ? { type: "resume", token: this.#token, seq: this.#seq }
        : { type: "start", sample_rate: RATE, encoding: "s16le", resume: true, ...this.#options };
      socket.send(JSON.stringify(hello));
    };
    socket.onmessage = ({ data }) => this.#receive(JSON.parse(data));
    socket.onclose = () => this.#lost();
  }

  #receive(message) {
    this.#seq = message.seq ?? this.#seq;
    if (message.samples !== undefined) this.#backlog.confirm(this.#offset + message.samples);
    switch (message.type) {
      case "ready":
        this.#ready = true;
        this.#attempt = 0;
        this.#token = message.resume.token;
        this.#endSent = message.resume.ended;
        if (this.#resuming) {
          this.#backlog.rewind(this.#offset + message.resume.samples);
        } else {
          this.#seq = 0;
          this.#offset = this.#backlog.rewind();
        }
        this.#pump = setInterval(() => this.#drain(), PUMP_MS);
        this.#listener.ready(message, this.#resuming);
        this.#listener.state(this.#stopping ? "finishing" : "live");
        this.#drain();
        break;
      case "partial":
        this.#listener.partial(this.#placed(message));
        break;
      case "final":
        // A server that shuts down ends the sessions itself. What it cut off is heard again by its successor.
        if (message.reason === "end" && !this.#endSent) break;
        this.#listener.final(this.#placed(message));
        this.#backlog.release(this.#offset + Math.round(message.end * RATE));
        break;
      case "ended":
        this.#token = null;
        if (!this.#endSent) break;
        this.#close();
        this.#listener.state("ended");
        break;
      case "error":
        this.#refusal = message;
        break;
    }
  }

  #placed(message) {
    const shift = this.#offset / RATE;
    return { ...message, start: message.start + shift, end: message.end + shift };
  }

  #drain() {
    if (!this.#ready || this.#endSent) return;
    while (this.#socket.bufferedAmount < SOCKET_BYTES) {
      const pcm = this.#backlog.next();
      if (pcm === null) {
        if (this.#stopping) {
          this.#endSent = true;
          this.#socket.send(JSON.stringify({ type: "end" }));
        }
        return;
      }
      this.#socket.send(pcm);
    }
  }

  #lost() {
    const refusal = this.#refusal;
    const was = this.#ready;
    this.#close();
    if (refusal?.code === "gone" && this.#resuming) {
      this.#token = null;
      this.#connect();
      return;
    }
    if (refusal !== null && refusal.code !== "busy") {
      this.#fail(`The server ended the session: ${refusal.message}`);
      return;
    }
    const again = () => this.#connect();
    if (was && this.#token !== null) {
      this.#listener.state("reconnecting");
      this.#timer = setTimeout(again, AGAIN_MS);
      return;
    }
    const delay = backoff(this.#attempt);
    this.#attempt += 1;
    this.#listener.state("waiting", { delay, busy: refusal !== null });
    this.#timer = setTimeout(again, delay);
  }

  #fail(message) {
    this.#close();
    this.#listener.state("failed", { message });
  }

  #close() {
    clearTimeout(this.#timer);
    clearInterval(this.#pump);
    this.#ready = false;
    if (this.#socket === null) return;
    this.#socket.onopen = this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close(1000); // by our own will: nobody is to wait for us
    this.#socket = null;
  }
}
