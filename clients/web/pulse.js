// Whether the microphone is heard. It counts looks, not time: a page that the browser has frozen looks at nothing, and
// a page that was only busy finds the packets that came meanwhile before it has looked often.

export const LOOK_MS = 500;
const PAUSED_LOOKS = 4; // without a packet: two seconds
const LOST_LOOKS = 60; // half a minute, less than servers wait before they end a silent session

export class Pulse {
  #onPause;
  #onLost;
  #looks = 0; // since the last packet
  #held = false;
  #paused = false;

  /**
   * @param {(paused: boolean) => void} onPause nothing is heard, or it is heard again
   * @param {() => void} onLost no packet came for so long that none is to be expected
   */
  constructor(onPause, onLost) {
    this.#onPause = onPause;
    this.#onLost = onLost;
  }

  /** A packet came. */
  beat() {
    this.#looks = 0;
    this.#tell();
  }

  /** @param {boolean} held whether the browser says that it holds the microphone back; there may be packets, of silence */
  hold(held) {
    this.#held = held;
    this.#tell();
  }

  /** To be called every LOOK_MS. */
  look() {
    this.#looks += 1;
    this.#tell();
    if (this.#looks === LOST_LOOKS) this.#onLost();
  }

  #tell() {
    const paused = this.#held || this.#looks >= PAUSED_LOOKS;
    if (paused === this.#paused) return;
    this.#paused = paused;
    this.#onPause(paused);
  }
}
