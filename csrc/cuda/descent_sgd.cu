// Descents with SGD.
#define SAMK_IS_ADAM false
#define SAMK_NAME(x) x##_sgd
#include "descent.inl"
