// What kernels call of the device's runtime: printf and assert.
#include <cstdio>
#include <cstring>

#include "ptx.h"

namespace emulator {

// `arguments`: each at its natural alignment, floats as double.
void device_vprintf(unsigned char* result, unsigned char* text, unsigned char* arguments) {
  const auto* next = load<const unsigned char*>(arguments);
  size_t offset = 0;
  const auto take = [&](auto value) {
    offset = (offset + sizeof value - 1) / sizeof value * sizeof value;
    memcpy(&value, next + offset, sizeof value);
    offset += sizeof value;
    return value;
  };
  std::string out;
  for (const char* p = load<const char*>(text); *p;) {
    if (*p != '%' || p[1] == '%') {
      out += *p;
      p += *p == '%' ? 2 : 1;
      continue;
    }
    const std::string one(p, strcspn(p + 1, "diouxXeEfFgGaAcsp") + 2);
    p += one.size();
    if (one.find('*') != one.npos) fail("printf: `%s` isn't emulated", one.c_str());
    if (strchr("eEfFgGaA", one.back())) {
      out += format(one.c_str(), take(0.0));
    } else if (one.back() == 's' || one.back() == 'p' || one.find_first_of("ljzt") != one.npos) {
      out += format(one.c_str(), take(uint64_t{0}));
    } else {
      out += format(one.c_str(), take(0));
    }
  }
  fputs(out.c_str(), stdout);
  fflush(stdout);
  store(result, static_cast<int>(out.size()));
}

void device_assertfail(unsigned char* message, unsigned char* file, unsigned char* line, unsigned char* function,
                       unsigned char*) {
  fail("%s:%u: %s: assertion `%s` failed", load<const char*>(file), load<uint32_t>(line), load<const char*>(function),
       load<const char*>(message));
}

}  // namespace emulator
