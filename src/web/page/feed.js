// The stream of events: opened, opened again when it breaks, and what it says of itself.

const AGAIN = 2000;

export class Feed {
  #source = null;
  #last = '';
  #timer = 0;

  /** `told` has a function for each event, and `state(how, why)` for the connection's own. */
  constructor(told) {
    this.told = told;
    this.open();
  }

  open() {
    clearTimeout(this.#timer);
    this.#source?.close();
    const after = this.#last ? `?after=${encodeURIComponent(this.#last)}` : '';
    const source = (this.#source = new EventSource(`/events${after}`));
    source.onopen = () => this.told.state('open');
    source.onerror = () => {
      // The browser tries again by itself where the connection broke, but not where it was refused in words.
      if (source.readyState === EventSource.CLOSED) this.#refused();
      else this.told.state('broken');
    };
    for (const name of ['hello', 'walked', 'missed', 'sockets', 'end']) {
      source.addEventListener(name, (event) => {
        if (event.lastEventId) this.#last = event.lastEventId;
        this.told[name](JSON.parse(event.data));
      });
    }
  }

  async #refused() {
    let why = 'nobody answers';
    try {
      const answer = await fetch('/events', { method: 'HEAD' });
      if (answer.status === 503) why = 'too many look already';
    } catch { /* Nobody answers. */ }
    this.told.state('broken', why);
    this.#timer = setTimeout(() => this.open(), AGAIN);
  }
}
