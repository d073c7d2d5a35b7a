// The microphone: permission, audio graph, and errors that say what to do.

import { LOOK_MS, Pulse } from "./pulse.js";

export const RATE = 16000;
const PACKET_SAMPLES = 640; // 40 ms, the shortest chunk a session can ask for
const LAST_MS = 1000; // to wait for the last packet

const REFUSALS = {
  NotAllowedError:
    "The microphone was refused. Allow it for this page in the browser's address bar, then press Start again.",
  NotFoundError: "No microphone was found. Connect one, then press Start again.",
  NotReadableError:
    "The microphone could not be opened; another program may be holding it. Close that program, then press Start again.",
};

/** Something between the person and the microphone; the message is fit to be shown. */
export class CaptureError extends Error {}

export class Capture {
  #stream;
  #context;
  #node;
  #stopped;
  #pulse;
  #looking = 0;

  /**
   * Asks for the microphone and begins to deliver 16-bit packets at 16 kHz.
   * @param {object} listener with packet(Int16Array), paused(boolean): whether the browser holds the microphone back,
   *   silent(): it has done so for long, and lost(): the device went away
   * @returns {Promise<Capture>}
   * @throws {CaptureError}
   */
  static async open(listener) {
    if (!window.isSecureContext || navigator.mediaDevices === undefined) {
      throw new CaptureError(
        `Browsers give the microphone only to pages from this machine or over https, and this page came from ${location.origin}. ` +
          "Open it as http://127.0.0.1 on the machine that runs the server, or put the server behind https.",
      );
    }
    const capture = new Capture();
    try {
      await capture.#prepare(listener);
      // The recogniser was trained on speech as it is: no echo canceller, noise gate or gain rider in between.
      capture.#stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
      });
      capture.#stream.getAudioTracks()[0].onended = () => listener.lost();
      capture.#context.createMediaStreamSource(capture.#stream).connect(capture.#node);
      capture.#watch();
    } catch (error) {
      await capture.#release();
      throw new CaptureError(REFUSALS[error.name] ?? `The microphone could not be used: ${error.message}`);
    }
    return capture;
  }

  /** Makes the audio graph, before the microphone opens: its first words must find it ready. */
  async #prepare(listener) {
    this.#context = new AudioContext({ latencyHint: "interactive" });
    await this.#context.audioWorklet.addModule("capture-worklet.js");
    this.#node = new AudioWorkletNode(this.#context, "loquent-capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { rate: RATE, packetSamples: PACKET_SAMPLES },
    });
    this.#pulse = new Pulse(listener.paused, listener.silent);
    this.#stopped = new Promise((resolve) => {
      this.#node.port.onmessage = ({ data }) => {
        this.#pulse.beat();
        if (data.packet.length > 0) listener.packet(data.packet);
        if (data.last) resolve();
      };
    });
    // The node writes nothing, so this is silent; some browsers run only nodes that lead to a destination.
    this.#node.connect(this.#context.destination);
    await this.#context.resume();
  }

  /** Tells when the browser holds the microphone back, and when packets stop without a word from it. */
  #watch() {
    const [track] = this.#stream.getAudioTracks();
    const hold = () => this.#pulse.hold(this.#context.state !== "running" || track.muted);
    this.#context.onstatechange = track.onmute = track.onunmute = hold;
    this.#looking = setInterval(() => {
      hold();
      this.#pulse.look();
    }, LOOK_MS);
  }

  #unwatch() {
    clearInterval(this.#looking);
    this.#context.onstatechange = null;
    for (const track of this.#stream.getTracks()) track.onmute = track.onunmute = track.onended = null;
  }

  /** Asks for the microphone back. Browsers listen to that when the page comes into view, or at a touch or a key. */
  resume() {
    // Refused while a call lasts, say. The notice says what to do.
    if (this.#context.state !== "running") this.#context.resume().catch(() => {});
  }

  /** Delivers the last packet, then lets go of the microphone. */
  async stop() {
    this.#unwatch();
    this.#node.port.postMessage("finish");
    // An audio thread that the browser has stopped does not answer.
    await Promise.race([this.#stopped, new Promise((resolve) => setTimeout(resolve, LAST_MS))]);
    this.#release();
  }

  /** Lets go of the microphone without the last packet. */
  abandon() {
    this.#unwatch();
    this.#node.port.onmessage = null;
    this.#release();
  }

  async #release() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    if (this.#context !== undefined && this.#context.state !== "closed") await this.#context.close();
  }
}
