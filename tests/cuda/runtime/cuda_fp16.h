#pragma once

struct __half {};
__half __ushort_as_half(unsigned short bits);
float __half2float(__half x);
