//! The landing page: plain links, nothing that runs.

/// The page at `/`.
pub(super) fn landing(ready: bool) -> String {
    let state = if ready { "ready" } else { "not ready: starting or draining" };
    format!(
        r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>echoscope</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.6 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }}
dt {{ font-family: ui-monospace, monospace }}
dd {{ margin: 0 0 .6rem 1.5rem }}
</style>
<h1>echoscope {version}</h1>
<p>See every TCP connection live its life. This process is <strong>{state}</strong>.</p>
<dl>
<dt><a href="/metrics">/metrics</a></dt><dd>Prometheus metrics: sockets by state from the kernel's own table, transitions, latencies.</dd>
<dt><a href="/api/sockets">/api/sockets</a></dt><dd>The census as JSON.</dd>
<dt><a href="/api/connections">/api/connections</a></dt><dd>Recent lives as JSON, each step with who saw it. <code>?limit=N</code>.</dd>
<dt><a href="/-/healthy">/-/healthy</a>, <a href="/healthz">/healthz</a></dt><dd>The process answers.</dd>
<dt><a href="/-/ready">/-/ready</a>, <a href="/readyz">/readyz</a></dt><dd>It takes traffic; 503 while it starts or drains.</dd>
</dl>
</html>
"#,
        version = env!("CARGO_PKG_VERSION"),
    )
}
