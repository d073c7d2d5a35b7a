// Keeps the screen on, where the browser can: a phone whose screen goes dark stops listening.

let wanted = false;
let lock = null;

/** @param {boolean} on whether the screen is to stay on from now */
export function keepAwake(on) {
  if (on === wanted) return;
  wanted = on;
  if (on) {
    request();
  } else {
    lock?.release();
    lock = null;
  }
}

async function request() {
  if (!wanted || document.visibilityState !== "visible") return;
  try {
    const given = await navigator.wakeLock.request("screen");
    if (wanted && (lock === null || lock.released)) lock = given;
    else given.release();
  } catch {
    // not supported or not allowed, with a low battery for instance: the screen goes its own way
  }
}

// A page that is hidden loses the lock.
document.addEventListener("visibilitychange", request);
