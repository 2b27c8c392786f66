/* Stands in for libnvidia-ml.so.1: the functions of NVML that attestation calls, with the layouts of nvml.h.

   It decides nothing. Each call is a line to a Unix socket, ADYTUM_FAKE_NVML, where a test answers with NVML's return
   code and the bytes of the result, in hexadecimal: "0 0a1b..". So GPUs, modes, errors and signatures are the test's.
   A number behind the bytes is the size that the library says instead of theirs. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LIMIT 65536
#define UNKNOWN 999
#define EXPORT __attribute__((visibility("default")))

typedef int ret;
typedef struct device *device; /* The GPU's place, plus one. */

static int hex(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

/* The code; up to `size` bytes into `out`, their number into `filled` where it is given. */
static ret ask(const char *line, unsigned char *out, size_t size, size_t *filled) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("ADYTUM_FAKE_NVML");
    if (!path || strlen(path) >= sizeof address.sun_path) return 9; /* No driver is loaded. */
    strcpy(address.sun_path, path);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (s < 0 || connect(s, (struct sockaddr *)&address, sizeof address)) {
        if (s >= 0) close(s);
        return 9;
    }
    static __thread char answer[LIMIT];
    size_t got = 0;
    ssize_t n = -1;
    if (write(s, line, strlen(line)) == (ssize_t)strlen(line) && !shutdown(s, SHUT_WR))
        while (got < sizeof answer - 1 && (n = read(s, answer + got, sizeof answer - 1 - got)) > 0) got += n;
    close(s);
    if (n != 0) return UNKNOWN;
    answer[got] = 0;
    char *bytes;
    long code = strtol(answer, &bytes, 10);
    if (bytes == answer || *bytes != ' ') return UNKNOWN;
    bytes++;
    char *said = strchr(bytes, ',');
    size_t count = (said ? (size_t)(said - bytes) : strlen(bytes)) / 2;
    if (count > size) return 7; /* Insufficient size. */
    for (size_t i = 0; i < count; i++) out[i] = hex(bytes[2 * i]) << 4 | hex(bytes[2 * i + 1]);
    if (filled) *filled = said ? strtoul(said + 1, 0, 10) : count;
    return (ret)code;
}

static ret ask_of(const char *what, device d, void *out, size_t size, size_t *filled) {
    char line[128];
    snprintf(line, sizeof line, "%s %ld", what, (long)(intptr_t)d - 1);
    return ask(line, out, size, filled);
}

static ret text(const char *line, char *out, unsigned size) {
    size_t n = 0;
    ret r = ask(line, (unsigned char *)out, size - 1, &n);
    out[n] = 0;
    return r;
}

EXPORT ret nvmlInitWithFlags(unsigned flags) { (void)flags; return ask("init", 0, 0, 0); }
EXPORT ret nvmlInit_v2(void) { return ask("init", 0, 0, 0); }
EXPORT ret nvmlShutdown(void) { return ask("shutdown", 0, 0, 0); }
EXPORT const char *nvmlErrorString(ret code) { (void)code; return "an error of the fake driver"; }
EXPORT ret nvmlSystemGetDriverVersion(char *out, unsigned size) { return text("driver", out, size); }

EXPORT ret nvmlDeviceGetCount_v2(unsigned *count) { return ask("count", (unsigned char *)count, 4, 0); }

EXPORT ret nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    *out = (device)(intptr_t)(index + 1);
    return ask_of("handle", *out, 0, 0, 0);
}

EXPORT ret nvmlDeviceGetName(device d, char *out, unsigned size) {
    size_t n = 0;
    ret r = ask_of("name", d, out, size - 1, &n);
    out[n] = 0;
    return r;
}

EXPORT ret nvmlDeviceGetVbiosVersion(device d, char *out, unsigned size) {
    size_t n = 0;
    ret r = ask_of("vbios", d, out, size - 1, &n);
    out[n] = 0;
    return r;
}

EXPORT ret nvmlDeviceGetArchitecture(device d, unsigned *out) { return ask_of("architecture", d, out, 4, 0); }

EXPORT ret nvmlSystemGetConfComputeState(unsigned state[3]) { return ask("state", (unsigned char *)state, 12, 0); }

#ifndef WITHOUT_SETTINGS
EXPORT ret nvmlSystemGetConfComputeSettings(unsigned settings[5]) {
    if (settings[0] != 0x1000014) return 25; /* Another version of the structure. */
    return ask("settings", (unsigned char *)(settings + 1), 16, 0);
}
#endif

EXPORT ret nvmlSystemGetConfComputeGpusReadyState(unsigned *out) { return ask("ready", (unsigned char *)out, 4, 0); }

EXPORT ret nvmlSystemSetConfComputeGpusReadyState(unsigned ready) {
    return ask(ready ? "set-ready 1" : "set-ready 0", 0, 0, 0);
}

EXPORT ret nvmlDeviceGetConfComputeMemSizeInfo(device d, uint64_t sizes[2]) {
    return ask_of("memory", d, sizes, 16, 0);
}

struct certificates {
    unsigned chain_size, attestation_chain_size;
    unsigned char chain[0x1000], attestation_chain[0x1400];
};

EXPORT ret nvmlDeviceGetConfComputeGpuCertificate(device d, struct certificates *out) {
    size_t n = 0;
    ret r = ask_of("certificates", d, out->attestation_chain, sizeof out->attestation_chain, &n);
    out->attestation_chain_size = (unsigned)n;
    return r;
}

struct report {
    unsigned has_cec, size, cec_size;
    unsigned char nonce[32], report[0x2000], cec_report[0x1000];
};

EXPORT ret nvmlDeviceGetConfComputeGpuAttestationReport(device d, struct report *out) {
    char line[128];
    int at = snprintf(line, sizeof line, "report %ld ", (long)(intptr_t)d - 1);
    for (int i = 0; i < 32; i++) at += snprintf(line + at, sizeof line - at, "%02x", out->nonce[i]);
    size_t n = 0;
    ret r = ask(line, out->report, sizeof out->report, &n);
    out->size = (unsigned)n;
    return r;
}
