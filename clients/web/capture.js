// The microphone: permission, audio graph, and errors that say what to do.

export const RATE = 16000;
const PACKET_SAMPLES = 640; // 40 ms, the shortest chunk a session can ask for

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

  /**
   * Asks for the microphone and begins to deliver 16-bit packets at 16 kHz.
   * @param {(packet: Int16Array) => void} onPacket
   * @param {() => void} onLost the device went away
   * @returns {Promise<Capture>}
   * @throws {CaptureError}
   */
  static async open(onPacket, onLost) {
    if (!window.isSecureContext || navigator.mediaDevices === undefined) {
      throw new CaptureError(
        `Browsers give the microphone only to pages from this machine or over https, and this page came from ${location.origin}. ` +
          "Open it as http://127.0.0.1 on the machine that runs the server, or put the server behind https.",
      );
    }
    const capture = new Capture();
    try {
      await capture.#prepare(onPacket);
      // The recogniser was trained on speech as it is: no echo canceller, noise gate or gain rider in between.
      capture.#stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
      });
      capture.#stream.getAudioTracks()[0].addEventListener("ended", onLost);
      capture.#context.createMediaStreamSource(capture.#stream).connect(capture.#node);
    } catch (error) {
      await capture.#release();
      throw new CaptureError(REFUSALS[error.name] ?? `The microphone could not be used: ${error.message}`);
    }
    return capture;
  }

  /** Makes the audio graph, before the microphone opens: its first words must find it ready. */
  async #prepare(onPacket) {
    this.#context = new AudioContext({ latencyHint: "interactive" });
    await this.#context.audioWorklet.addModule("capture-worklet.js");
    this.#node = new AudioWorkletNode(this.#context, "loquent-capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { rate: RATE, packetSamples: PACKET_SAMPLES },
    });
    this.#stopped = new Promise((resolve) => {
      this.#node.port.onmessage = ({ data }) => {
        if (data.packet.length > 0) onPacket(data.packet);
        if (data.last) resolve();
      };
    });
    // The node writes nothing, so this is silent; some browsers run only nodes that lead to a destination.
    this.#node.connect(this.#context.destination);
    await this.#context.resume();
  }

  /** Delivers the last packet, then lets go of the microphone. */
  async stop() {
    this.#node.port.postMessage("finish");
    await this.#stopped;
    await this.#release();
  }

  /** Lets go of the microphone without the last packet. */
  abandon() {
    this.#node.port.onmessage = null;
    this.#release();
  }

  async #release() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    if (this.#context !== undefined && this.#context.state !== "closed") await this.#context.close();
  }
}
