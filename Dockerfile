# One static binary on nothing: no shell, no libc, no package, no root.
#
#   docker build -t echoscope .
#   docker run --rm echoscope
#
# Needs no capability, no writable file system and no volume: docker-compose.yml shows it hardened.
ARG RUST_IMAGE=rust:1.95-bookworm

FROM ${RUST_IMAGE} AS build
# Or quick: see Cargo.toml.
ARG BUILD_PROFILE=release
WORKDIR /src
# The target is named although it is the host's: so the flags stay off build scripts and procedural macros, which
# cannot be static. Symbols are kept for backtraces, line tables are not: they would double the image.
ENV RUSTFLAGS="-C target-feature=+crt-static" \
    CARGO_PROFILE_RELEASE_STRIP=debuginfo
# The dependencies in a layer of their own, built around an empty program: a change of the source builds the source.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
 && echo 'fn main() {}' | tee src/main.rs benches/census.rs benches/echo.rs >/dev/null \
 && touch src/lib.rs \
 && cargo build --locked --profile "$BUILD_PROFILE" --target "$(rustc -vV | sed -n 's/^host: //p')"
COPY src src
# Newer than what was built around the empty program, whatever the times in the build context.
RUN touch src/main.rs src/lib.rs \
 && host=$(rustc -vV | sed -n 's/^host: //p') \
 && cargo build --locked --profile "$BUILD_PROFILE" --target "$host" --bin echoscope \
 && cp "target/$host/$BUILD_PROFILE/echoscope" /echoscope

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="echoscope" \
      org.opencontainers.image.description="See every TCP connection live its life: an observed echo server and client, as metrics, logs and JSON" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /echoscope /echoscope
# From outside the container, where Prometheus is.
ENV ECHOSCOPE_WEB_LISTEN_ADDRESS=:9907 \
    ECHOSCOPE_LOG_FORMAT=json
# By number: there is no /etc/passwd, and runAsNonRoot can only check a number.
USER 65532:65532
EXPOSE 7007 9907
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["/echoscope", "health"]
ENTRYPOINT ["/echoscope"]
