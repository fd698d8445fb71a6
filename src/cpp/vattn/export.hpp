// VATTN_API marks what libvattn exports; everything else stays inside the shared library.
#pragma once

#define VATTN_API __attribute__((visibility("default")))
