// A census, whoever took it, in one shape; and what looks wrong in it.

import { age, count } from './words.js';

// As in the alerts, and as the watch has them by default.
const OLD = 60;
const LEAK = 900;
const PORTS_SHORT = 0.8;
const PORTS_OUT = 0.95;

/** The services of a census, each with a key by which it can be chosen. */
export function services(census) {
  return census.services.map((service) => {
    const process = service.process ? ` ${service.process.name}` : '';
    const of = service.role === 'server' ? `port ${service.port}${process}` : `to port ${service.port}`;
    return { ...service, key: `${service.role} ${service.port}`, name: service.port === 'other' ? 'going out' : of };
  });
}

/** How many sockets are in a state (by its label), and the oldest, for one role of the services. */
export function sum(services, role, label) {
  let [n, oldest, atLeast] = [0, null, false];
  for (const service of services) {
    if (service.role !== role) continue;
    n += service.sockets[label];
    const time = service.sockets[label] ? service.oldest_seconds[label] : undefined;
    if (time !== undefined && (oldest === null || time > oldest)) {
      oldest = time;
      atLeast = service.at_least?.includes(label) ?? false;
    }
  }
  return { n, oldest, atLeast };
}

/** What looks wrong: how bad, in which state, in words. */
export function findings(census) {
  // The watch has looked itself, with the thresholds that it was given.
  if (census.findings) {
    return census.findings.map(({ severity, text }) => {
      const state = text.includes('CLOSE_WAIT') ? 'CLOSE_WAIT' : text.includes('local ports') ? 'TIME_WAIT' : null;
      return { bad: severity === 'critical', state, text };
    });
  }
  const found = [];
  for (const { role, port, sockets, oldest_seconds, accept_queue: queue } of census.services) {
    const oldest = oldest_seconds.close_wait ?? 0;
    if (sockets.close_wait > 0 && oldest >= OLD) {
      const text = `${role} port ${port}: ${count(sockets.close_wait)} CLOSE_WAIT, the oldest for ${age(oldest)}: FIN came, and the application has not closed`;
      found.push({ bad: oldest >= LEAK, state: 'CLOSE_WAIT', text });
    }
    if (queue?.limit && queue.length * 2 > queue.limit) {
      const text = `port ${port}: ${count(queue.length)} wait to be accepted, ${count(queue.limit)} may: the application accepts too slowly`;
      found.push({ bad: queue.length > queue.limit, state: 'LISTEN', text });
    }
  }
  for (const { target, local_ports_used: used, local_ports_limit: limit } of census.targets ?? []) {
    if (limit && used / limit >= PORTS_SHORT) {
      const text = `${count(used)} of ${count(limit)} local ports towards ${target} are taken: soon nothing can connect there`;
      found.push({ bad: used / limit >= PORTS_OUT, state: 'TIME_WAIT', text });
    }
  }
  return found;
}
