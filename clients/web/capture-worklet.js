// Runs on the audio thread: device samples in, 16 kHz 16-bit packets out through the port.
// A message to the port ends the stream; the last packet comes back with `last: true`.

import { Packetizer } from "./packets.js";
import { Resampler } from "./resample.js";

class Capture extends AudioWorkletProcessor {
  #resampler;
  #packetizer;
  #finished = false;

  constructor(options) {
    super();
    const { rate, packetSamples } = options.processorOptions;
    this.#resampler = new Resampler(sampleRate, rate);
    this.#packetizer = new Packetizer(packetSamples);
    this.port.onmessage = () => this.#finish();
  }

  process(inputs) {
    const mono = inputs[0][0]; // mixed down by the node; absent while no source is connected
    if (mono !== undefined && !this.#finished) this.#send(this.#resampler.process(mono));
    return !this.#finished;
  }

  #send(samples) {
    for (const packet of this.#packetizer.push(samples)) {
      this.port.postMessage({ packet, last: false }, [packet.buffer]);
    }
  }

  #finish() {
    if (this.#finished) return;
    this.#finished = true;
    this.#send(this.#resampler.finish());
    const packet = this.#packetizer.finish();
    this.port.postMessage({ packet, last: true }, [packet.buffer]);
  }
}

registerProcessor("loquent-capture", Capture);
